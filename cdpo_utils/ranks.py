"""Several processes that train one policy, as `accelerate launch` starts them; with one process, nothing happens here.

Every rank runs the same code. Training divides each batch among them (DDP or FSDP averages gradients); sampling and
reference log-probabilities are divided by `share` and put together by `merge`; the costs of the dual step are the first
rank's (`of_first`), so that the multiplier and the decision to stop are the same on every rank.
"""

import os

import torch
import torch.distributed as dist


def world():
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """This process's number, 0 for the first."""
    return dist.get_rank() if world() > 1 else 0


def sharded():
    """Whether trainers keep a part of the weights on each rank: FSDP, as `accelerate launch` announces it."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and dist.is_available() and dist.is_initialized()


def share(items):
    """Every world-th item, beginning with this rank's."""
    return items[rank() :: world()]


def merge(found):
    """The union of all ranks' dicts, in the order of the ranks."""
    if world() == 1:
        return found
    parts = [None] * world()
    dist.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


def with_others(values):
    """The ranks' tensors (n,) end to end, (world * n,). Gradients flow into this rank's own part alone."""
    if world() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(parts, values.detach().contiguous())
    parts[rank()] = values
    return torch.cat(parts)


def of_first(value):
    """The first rank's value, on every rank: what is scored on many devices may differ in the last digit."""
    if world() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
