"""What every test shares: one thread, no network, and uninitialised memory that cannot pass for zeros."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty holds NaN, so that a result that was never written shows; every test starts from one seed."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
