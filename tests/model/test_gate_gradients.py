"""The gradients of A_log and dt_bias by the native delta rule, beside those of transformers."""

import pytest
from gate_gradients import CASES, compare_with_transformers

from kernels import Kernels


@pytest.mark.parametrize("case", CASES)
def test_at_most_twice_the_error_of_transformers(case):
    compare_with_transformers(Kernels(), case, [70, 1, 25], seeds=3)
