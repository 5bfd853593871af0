"""What rehearsals on a CPU need of it."""

import pytest
from torch._subclasses.fake_tensor import FakeTensor

from kernels import native


class EqualShares(list):
    """The experts' shares of the rows, in place of a tensor that cannot be read."""

    def tolist(self) -> list[int]:
        return self


@pytest.fixture(autouse=True, scope="module")
def known_rows():
    """The native grouped matmuls read how many rows each expert has."""

    def known(op):
        def with_known_rows(rows, other, ends):
            if isinstance(ends, FakeTensor):
                ends = EqualShares(len(rows) * i // len(ends) for i in range(1, len(ends) + 1))
            return op(rows, other, ends)

        return with_known_rows

    with pytest.MonkeyPatch.context() as patch:
        for name in ("grouped_matmul", "grouped_weight_grad"):
            patch.setattr(native, name, known(getattr(native, name)))
        yield
