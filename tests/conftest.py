"""What every test shares: fixed seeds, one thread for tiny tensors, reproducible property tests."""

import os
import random

import hypothesis
import pytest
import torch

# No test may reach for a model hub; what is needed is built on the spot.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Where the test runner is root (a container), Chromium and pip are quiet about it.
os.environ.setdefault("PIP_ROOT_USER_ACTION", "ignore")

torch.set_num_threads(1)

# The same examples on every machine and every run: a red test is red for everybody. Timing is no
# part of a property, hence no deadline.
hypothesis.settings.register_profile("book", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("book")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
