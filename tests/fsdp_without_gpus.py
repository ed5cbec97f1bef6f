"""`python -m cdpo_utils.train` under `accelerate launch` with FSDP, on processors, in float32: for tests.

torch's fully_shard works over gloo, but accelerate 1.15 shards only where processes are of a kind with GPUs
(AcceleratorState.__init__) and else trains by DDP without a word. So processes on processors are given that kind here.
"""

import sys

import torch
import torch.distributed.fsdp
from accelerate import PartialState
from accelerate.utils import DistributedType

join, shard, parts = PartialState.__init__, torch.distributed.fsdp.fully_shard, []


def as_with_gpus(state, *args, **kwargs):
    join(state, *args, **kwargs)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def watched(module, *args, **kwargs):
    parts.append(module)
    return shard(module, *args, **kwargs)


PartialState.__init__, torch.distributed.fsdp.fully_shard = as_with_gpus, watched

from cdpo_utils import preflight, train  # noqa: E402

preflight.precision = lambda: torch.float32
status = train.main()
assert parts, "nothing was sharded"
sys.exit(status)
