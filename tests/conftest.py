import os

import pytest
import torch
from hypothesis import settings
from table import LOSSES, usable_backends

# A deadline would tell how loaded the machine is.
settings.register_profile("default", deadline=None, max_examples=int(os.environ.get("MLKERNELS_EXAMPLES", "60")))
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _reproducible():
    # Not torch.manual_seed: for devices that are not there it keeps a stack trace, 5 ms a test.
    torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    # Small tensors all over: two threads would wait for each other. test_layouts.py has what takes more.
    torch.set_num_threads(1)


@pytest.fixture(params=usable_backends())
def backend(request):
    """Every backend that can be used here on the CPU."""
    return request.param


@pytest.fixture(params=LOSSES, ids=str)
def loss(request):
    """Every loss of the table."""
    return request.param
