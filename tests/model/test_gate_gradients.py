"""The gradients of A_log and dt_bias by the native delta rule, beside those of transformers."""

import pytest
import torch
from gate_gradients import compare_with_transformers

from kernels import Kernels


@pytest.mark.parametrize("alike", [False, True], ids=["tokens", "tokens alike"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_at_most_twice_the_error_of_transformers(dtype, alike):
    compare_with_transformers(Kernels(), dtype, 96, alike, seeds=3)
