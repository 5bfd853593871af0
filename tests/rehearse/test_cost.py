"""Bytes, launches and workspaces that a rehearsal counts, rule by rule, against numbers by hand."""

from math import ceil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rehearse.cost import bytes_moved, launches, workspace

aten = torch.ops.aten
HALF, FULL, WORDS = torch.bfloat16, torch.float32, torch.int64


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = self.workspace = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.bytes += bytes_moved(func, args, kwargs, made)
        self.launches += launches(func, args)
        self.workspace = max(self.workspace, workspace(func, args, kwargs, made))
        return out


def tensor(*shape: int, dtype: torch.dtype = FULL) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def counted(call, *tensors) -> Counted:
    with Counted() as found:
        call(*tensors)
    return found


x, half, other, column = (
    tensor(8, 16),
    tensor(8, 16, dtype=HALF),
    tensor(8, 16),
    tensor(8, 1),
)  # 512, 256, 512, 32 bytes
rows, table, index = tensor(3, 16), tensor(100, 16), tensor(3, dtype=WORDS)  # 192, 6400, 24 bytes
CASES = {  # name -> call, bytes by hand
    # read once, written once, each in its own dtype
    "one": (lambda: x * 2, 512 + 512),
    "two": (lambda: x + other, 512 + 512 + 512),
    "half": (lambda: half * 2, 256 + 256),
    "cast": (lambda: x.to(HALF), 512 + 256),
    "mixed dtypes": (lambda: x + half, 512 + 256 + 512),
    "twice the same": (lambda: x * x, 512 + 512),
    "reduction": (lambda: x.sum(1), 512 + 32),
    "cat": (lambda: torch.cat([x, rows]), 512 + 192 + 704),
    # broadcast axes take no memory
    "broadcast": (lambda: x * column, 512 + 32 + 512),
    "expanded": (lambda: column.expand(8, 16) + 1, 32 + 512),
    "expanded, made whole": (column.expand(8, 16).contiguous, 32 + 512),
    # views of a part, and transposed
    "half of the columns": (lambda: x[:, :8] + 1, 256 + 256),
    "transposed": (lambda: x.T + 1, 512 + 512),
    "transposed, made whole": (x.T.contiguous, 512 + 512),
    # a tensor changed in place is read and written, `out` is only written
    "in place": (lambda: x.add_(other), 512 + 512 + 512),
    "in place, a scalar": (lambda: x.mul_(2), 512 + 512),
    "out": (lambda: torch.add(x, rows[:1], out=other), 512 + 64 + 512),
    "masked fill in place": (lambda: x.masked_fill_(tensor(8, 1, dtype=torch.bool), 0), 512 + 8 + 512),
    "copy": (lambda: half.copy_(x), 512 + 256),
    "copy of a row": (lambda: x.copy_(rows[:1].expand(8, 16)), 64 + 512),
    "from the host": (lambda: half.copy_(torch.empty(8, 16)), 256),
    "fill": (lambda: x.fill_(1), 512),
    "zero": (x.zero_, 512),
    # neither read nor written
    "view": (lambda: x.view(-1)[3:].unsqueeze(0).detach(), 0),
    "reshape of what lies so": (lambda: x.reshape(128), 0),
    "expand": (lambda: column.expand(8, 16), 0),
    "empty": (lambda: torch.empty(8, 16, device="meta"), 0),
    "empty, as another": (lambda: (torch.empty_like(x), x.new_empty(5), x.new_empty_strided((2, 2), (2, 1))), 0),
    # only written
    "zeros": (lambda: torch.zeros(8, 16, device="meta"), 512),
    "zeros, as another": (lambda: torch.zeros_like(half), 256),
    "new zeros, and none": (lambda: (table.new_zeros(2), table.new_zeros(0)), 8),
    "range": (lambda: torch.arange(10, device="meta"), 80),
    # bound by arithmetic, but for those with a short side
    "matmul": (lambda: tensor(256, 256) @ tensor(256, 512), 0),
    "matmul, thin": (lambda: tensor(256, 255, dtype=HALF) @ tensor(255, 512, dtype=HALF), 130560 + 261120 + 262144),
    "matmul to few columns": (lambda: tensor(300, 400) @ tensor(400, 8), 480000 + 12800 + 9600),
    "matmuls, thin": (lambda: tensor(2, 300, 4).bmm(tensor(2, 4, 300)), 9600 + 9600 + 720000),
    "addmm in place": (lambda: tensor(300, 400).addmm_(tensor(300, 256), tensor(256, 400)), 0),
    "addmm in place, thin": (lambda: x.addmm_(tensor(8, 4), tensor(4, 16)), 512 + 128 + 256 + 512),
    # the rows that are returned, and the indices
    "embedding": (lambda: torch.embedding(table, index), 192 + 24 + 192),
    "index": (lambda: table[index], 192 + 24 + 192),
    "index select": (lambda: table.index_select(0, index), 192 + 24 + 192),
    "gather": (lambda: table.gather(1, tensor(100, 1, dtype=WORDS)), 400 + 800 + 400),
    # rows are written, and read first where they are added to
    "scatter a number": (lambda: table.scatter_(1, tensor(100, 2, dtype=WORDS), 1.0), 1600 + 800),
    "scatter": (lambda: table.scatter_(1, tensor(100, 2, dtype=WORDS), tensor(100, 2)), 1600 + 800 + 800),
    "scatter, not in place": (lambda: table.scatter(1, tensor(100, 2, dtype=WORDS), 1.0), 1600 + 800 + 2 * 6400),
    "scatter add": (lambda: table.scatter_add_(1, tensor(100, 2, dtype=WORDS), tensor(100, 2)), 1600 + 800 + 2 * 800),
    "index add": (lambda: table.index_add_(0, index, rows), 24 + 192 + 2 * 192),
    "index put": (lambda: table.index_put_((index,), rows), 24 + 192 + 192),
    "index put of one number": (lambda: table.index_put_((index,), tensor(1)), 24 + 4 + 192),
    "index put, added": (lambda: table.index_put_((index,), rows, accumulate=True), 24 + 192 + 2 * 192),
    "embedding, backward": (
        lambda: aten.embedding_dense_backward(rows, index, 100, -1, False),
        3 * 192 + 24 + 3 * 6400,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_moved(name):
    call, expected = CASES[name]
    assert counted(call).bytes == expected


def test_fused_adamw_launches_two_kernels_per_parameter():
    """Three tensors are read and written, gradient and step are read."""
    parameters, grads, first, second = ([tensor(8, 16) for _ in range(5)] for _ in range(4))
    call = aten._fused_adamw_.default, (parameters, grads, first, second, [], [tensor() for _ in range(5)])
    assert bytes_moved(*call, {}, []) == 5 * (7 * 512 + 4) and launches(*call) == 10


def test_collectives_move_no_bytes_here():
    assert bytes_moved(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0"), {}, [other]) == 0


def test_launches_of_operators_and_lists():
    for call, expected in (
        (lambda: x + other, 1),
        (lambda: x.view(-1), 0),
        (lambda: torch.empty(3, device="meta"), 0),
        (lambda: torch.zeros(3, device="meta"), 1),
        (lambda: x[:, 0] * 2, 1),
    ):
        assert counted(call).launches == expected
    for count in (1, 24, 25, 100):
        many = [tensor(4) for _ in range(count)]
        assert launches(aten._foreach_norm.Scalar, (many,)) == ceil(count / 24)
        assert launches(aten._foreach_add_.Scalar, (many, 1)) == launches(aten._foreach_copy_.default, (many, many))
        assert launches(aten._foreach_add_.Scalar, (many, 1)) == ceil(count / 48)
        assert launches(aten._foreach_mul_.Tensor, (many, tensor())) == count
    with pytest.raises(NotImplementedError, match=r"aten::_foreach_sqrt: "):
        launches(aten._foreach_sqrt.default, ([x],))


def test_bytes_of_lists_of_tensors():
    many = [tensor(4, dtype=HALF) for _ in range(6)]  # 8 bytes each
    assert counted(lambda: torch._foreach_mul_(many, tensor())).bytes == 6 * 16 + 4
    assert counted(lambda: torch._foreach_add_(many, 1)).bytes == 6 * 16
    assert counted(lambda: torch._foreach_norm(many)).bytes == 6 * (8 + 2)
    assert counted(lambda: torch._foreach_copy_(many, [tensor(4) for _ in many])).bytes == 6 * (8 + 16)


def test_workspaces():
    """The embedding's gradient is accumulated in a second [V, H], of bf16 or if small of fp32."""
    base = 16 << 20
    assert counted(lambda: x + 1).workspace == 0
    grad, ids = tensor(1024, 2048, dtype=HALF), tensor(1024, dtype=WORDS)
    large = counted(lambda: aten.embedding_dense_backward(grad, ids, 100_000, -1, False))
    assert large.workspace == base + 100_000 * 2048 * 2
    narrow = tensor(200_000, 512, dtype=HALF)
    short = counted(lambda: aten.embedding_dense_backward(narrow, tensor(200_000, dtype=WORDS), 100_000, -1, False))
    assert short.workspace == base + 100_000 * 512 * (2 + 4)
    few = counted(lambda: aten.embedding_dense_backward(grad[:100], ids[:100], 100_000, -1, False))
    assert few.workspace == base + 4 * (100_000 * 2048 + 100 * 2048)
