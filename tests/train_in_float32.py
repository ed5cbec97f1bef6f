"""`python -m cdpo_utils.train` with pretrained models in float32, as in `conftest`: for tests on several processes."""

import sys

import torch

from cdpo_utils import preflight, train

preflight.precision = lambda: torch.float32
sys.exit(train.main())
