"""The routed experts with adapters, against merged weights that autograd differentiates."""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from test_kernels import DTYPES, error, saved_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels import native, reference
from kernels.moe_lora import ExpertAdapters

E, H, INNER, RANK, SCALE = 8, 16, 24, 8, 1.7
NAMES = ("x", "weights", "gate_up", "down", "gate_up_a", "gate_up_b", "down_a", "down_b")
BASES, ADAPTERS = NAMES[2:4], NAMES[4:]
ADAPTED = {"both": ADAPTERS, "gate_up": ADAPTERS[:2], "down": ADAPTERS[2:]}


def problem(tokens: int, top_k: int, hidden: int = H, inner: int = INNER, rank: int = RANK) -> dict[str, Tensor]:
    """Adapters that add as much as the weights give; ids: experts 3 and 6 get no tokens."""
    ids = torch.rand(tokens, 6).topk(top_k).indices
    ids[ids == 3] = 7
    shapes = {
        "x": (tokens, hidden),
        "gate_up": (E, 2 * inner, hidden),
        "down": (E, hidden, inner),
        "gate_up_a": (E, rank, hidden),
        "gate_up_b": (E, 2 * inner, rank),
        "down_a": (E, rank, inner),
        "down_b": (E, hidden, rank),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    return tensors | {"ids": ids, "weights": torch.rand(tokens, top_k)}


def leaves(tensors: dict[str, Tensor], dtype: torch.dtype, frozen: Sequence[str] = ()) -> dict[str, Tensor]:
    return {
        name: t if name == "ids" else t.detach().to(dtype).requires_grad_(name not in frozen)
        for name, t in tensors.items()
    }


def run(module, t: dict[str, Tensor], adapted: Sequence[str] = ADAPTERS, scale: float = SCALE, **options) -> Tensor:
    gate_up, down = ((t[f"{p}_a"], t[f"{p}_b"]) if f"{p}_a" in adapted else None for p in BASES)
    adapters = ExpertAdapters(scale, gate_up, down)
    return module.moe_experts(t["x"], t["ids"], t["weights"], t["gate_up"], t["down"], adapters=adapters, **options)


def compare(tensors, dtype, tolerance, adapted=ADAPTERS, frozen=()) -> dict[str, Tensor]:
    """Output and all gradients in `dtype` beside the reference's in fp64 -> ours."""
    mine = leaves(tensors, dtype, frozen)
    exact = leaves({n: t.to(dtype) if n != "ids" else t for n, t in tensors.items()}, torch.float64)
    ours, theirs = run(kernels, mine, adapted), run(reference, exact, adapted)
    probe = torch.randn_like(theirs)
    (ours.double() * probe).sum().backward()
    (theirs * probe).sum().backward()
    assert ours.dtype == dtype and error(ours, theirs) <= tolerance, error(ours, theirs)
    for name in NAMES:
        grad = mine[name].grad
        if name in frozen or (name in ADAPTERS and name not in adapted):
            assert grad is None, name
            continue
        assert grad.dtype == dtype and grad.shape == mine[name].shape, name
        assert error(grad, exact[name].grad) <= tolerance, (name, error(grad, exact[name].grad))
    return mine


@DTYPES
@pytest.mark.parametrize("frozen", [(), BASES, (*BASES, "x")], ids=["all trained", "frozen", "frozen, and x"])
@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (1, 1), (64, 1), (65, 3), (200, 2)])
def test_equal_merged_weights(tokens, top_k, adapted, frozen, dtype, tolerance):
    mine = compare(problem(tokens, top_k), dtype, tolerance, ADAPTED[adapted], frozen)
    for name in ADAPTED[adapted]:
        assert mine[name].grad.flatten(1).any(1).sum() and not mine[name].grad[[3, 6]].any(), name


def test_with_any_inputs_frozen():
    """All 255 choices, against the gradients of them all."""
    tensors = problem(20, 2)
    exact = leaves(tensors, torch.float64)
    run(reference, exact).sum().backward()
    for chosen in product((False, True), repeat=len(NAMES)):
        frozen = [name for name, is_chosen in zip(NAMES, chosen, strict=True) if is_chosen]
        if len(frozen) == len(NAMES):
            continue
        mine = leaves(tensors, torch.float32, frozen)
        run(kernels, mine).sum().backward()
        for name in NAMES:
            if name in frozen:
                assert mine[name].grad is None, (name, frozen)
            else:
                assert error(mine[name].grad, exact[name].grad) <= 2e-5, (name, frozen)


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (0, 1)])
@pytest.mark.parametrize("adapted", ADAPTED)
def test_without_tokens(tokens, top_k, adapted):
    """Gradients are zeros, not missing: every rank reduces the same."""
    mine = leaves(problem(tokens, top_k), torch.float32, BASES)
    out = run(kernels, mine, ADAPTED[adapted])
    out.sum().backward()
    assert out.shape == mine["x"].grad.shape == (0, H)
    for name in ADAPTED[adapted]:
        assert mine[name].grad.shape == mine[name].shape and not mine[name].grad.any()


@DTYPES
@pytest.mark.parametrize("rank", [1, 3, 4, 12])
def test_ranks_and_sizes_that_no_tile_has(rank, dtype, tolerance):
    compare(problem(30, 2, rank=rank), dtype, tolerance)
    compare(problem(30, 2, hidden=21, inner=7, rank=rank), dtype, tolerance, frozen=BASES)


def test_gradients_in_fp64():
    tensors = leaves(problem(9, 2, hidden=3, inner=2, rank=2), torch.float64)
    inputs = [tensors[name] for name in NAMES]

    def op(*values):
        return run(kernels, tensors | dict(zip(NAMES, values, strict=True)))

    assert torch.autograd.gradcheck(op, inputs)


def test_new_adapters_change_nothing():
    """B is zero: the base's bits, gradients of x too; A gets a gradient once B moves."""
    tensors = problem(40, 2) | {name: torch.zeros_like(problem(1, 1)[name]) for name in ("gate_up_b", "down_b")}
    mine, plain = leaves(tensors, torch.float32, BASES), leaves(tensors, torch.float32, BASES)
    ours, base = run(kernels, mine), run(kernels, plain, ())
    ours.square().sum().backward()
    base.square().sum().backward()
    assert torch.equal(ours, base) and torch.equal(mine["x"].grad, plain["x"].grad)
    assert all(mine[f"{p}_b"].grad.any() and not mine[f"{p}_a"].grad.any() for p in BASES)


@pytest.mark.parametrize("adapted", ADAPTED)
def test_backward_keeps_nothing_more(adapted):
    """Bytes of activations, whose number is the one without adapters."""
    mine = leaves(problem(128, 2), torch.float32, BASES)
    kept = [
        saved_bytes(lambda names=names: run(kernels, mine, names)) - sum(mine[name].nbytes for name in names)
        for names in ((), ADAPTED[adapted])
    ]
    assert kept[0] == kept[1] > 0


class Sizes(TorchDispatchMode):
    """The shapes of all tensors that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known]
        self.seen.update(tuple(x.shape) for x in made)
        return out


def test_nothing_of_a_weight_s_size_is_made():
    """No merged weight and no gradient of a frozen one; a trained one's is found."""
    for frozen in (BASES, ()):
        mine = leaves(problem(30, 2, rank=2), torch.float32, frozen)
        with Sizes() as sizes:
            run(kernels, mine).sum().backward()
        big = [shape for shape in sizes.seen if shape[:1] == (E,) and torch.Size(shape).numel() >= E * H * INNER]
        assert sorted(big) == ([] if frozen else [(E, H, INNER), (E, 2 * INNER, H)]), big


def primitives_called(adapted: Sequence[str], frozen: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Those of forward and of backward, in turn."""
    called = []

    def counted(name):
        return lambda *args, **options: called.append(name) or getattr(native, name)(*args, **options)

    mine = leaves(problem(10, 2), torch.float32, frozen)
    out = run(kernels, mine, adapted, primitives=SimpleNamespace(**{n: counted(n) for n in vars(native)}))
    forward = called.copy()
    called.clear()
    out.sum().backward()
    return forward, called


def test_primitives_with_and_without_adapters():
    """Without adapters these are all; an adapter adds two matmuls a way, and two gradients."""
    matmul, of_weight = "grouped_matmul", "grouped_weight_grad"
    forward, backward = primitives_called(())
    assert forward == ["permute", matmul, "swiglu", matmul, "unpermute"]
    assert backward == [
        *("sorted_rows", matmul, "weight_of_row", "swiglu", "weigh", "swiglu_backward"),
        *(of_weight, "sorted_rows", of_weight, matmul, "permute_backward"),
    ]
    plain = Counter(forward), Counter(backward)
    for adapted in ADAPTED.values():
        pairs = len(adapted) // 2
        more = [Counter(part) - few for part, few in zip(primitives_called(adapted), plain, strict=True)]
        assert more == [{matmul: 2 * pairs}, {matmul: 3 * pairs, of_weight: 2 * pairs}]
        _, frozen = primitives_called(adapted, BASES)
        assert Counter(frozen)[of_weight] == 2 * pairs
    _, frozen = primitives_called(ADAPTERS, (*BASES, "gate_up_a", "gate_up_b"))
    assert Counter(frozen)["sorted_rows"] == 1  # x's rows are for gradients of gate_up alone
