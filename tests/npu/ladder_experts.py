"""Expert parallelism on the NPU primitives: contract on fake tensors, numbers with bodies.py.

In the numeric tests ranks are threads, see threads.py.
"""

import functools
from collections import Counter

import pytest
import threads
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # torch 2.7 registers the collectives' shapes in it
from bodies import alltoallv_gmm, check_exchange, error, gmm_alltoallv, install
from fused import fused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from watch import Watch

import kernels
from kernels import fused_exchange, npu, reference
from kernels.moe_lora import ExpertAdapters
from rehearse.communication import balanced_counts

RANKS, HIDDEN, INNER, LOW = 8, 16, 24, 4
# module, top_k: all-gather if it exceeds the number of ranks
WAYS = {"all-to-all": (fused, 2), "all-gather": (fused, 9), "fused": (fused_exchange, 2)}
FUSED = {"npu_alltoallv_gmm", "npu_gmm_alltoallv"}
ADAPTED = pytest.mark.parametrize(
    ("way", "adapted"),
    [*((way, False) for way in WAYS), ("all-to-all", True), ("all-gather", True)],
    ids=lambda x: x if isinstance(x, str) else "adapters" * x,
)


def stacks(experts: int) -> list[tuple[int, ...]]:
    """Shapes of the weights, and of their adapters."""
    weights = [(experts, 2 * INNER, HIDDEN), (experts, HIDDEN, INNER)]
    pairs = [(experts, LOW, HIDDEN), (experts, 2 * INNER, LOW)], [(experts, LOW, INNER), (experts, HIDDEN, LOW)]
    return [*weights, *pairs[0], *pairs[1]]


@pytest.fixture(autouse=True)
def named(monkeypatch):
    monkeypatch.setattr(npu, "communicator", lambda group: "experts")


@pytest.fixture
def virtual():
    """A fake group of eight ranks, as seen by rank 0."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def documented_bodies():
    library = install()
    yield
    library._destroy()


@ADAPTED
@pytest.mark.parametrize("imbalance", [1.0, 1.5])
def test_contract(way, adapted, imbalance, virtual):
    """Shapes, dtypes, no operator without a kernel, no sync but the (here balanced) counts."""
    (module, top_k), tokens, dtype = WAYS[way], 64, torch.bfloat16
    asked = []

    def count_reader(counts, *of):
        asked.append(counts.shape)
        return balanced_counts(counts, *of, imbalance=imbalance)

    with FakeTensorMode(), torch.device("npu:0"), Watch() as watch:
        ids = torch.zeros(tokens, top_k, dtype=torch.long)
        shapes = [(tokens, HIDDEN), (tokens, top_k), *stacks(2)]
        leaves = [
            torch.empty(s, dtype=dtype, requires_grad=not adapted or i not in (2, 3)) for i, s in enumerate(shapes)
        ]
        x, weights, gate_up, down, *low = leaves if adapted else leaves[:4]
        options = {"count_reader": count_reader, "adapters": adapters(low)}
        y = module.moe_experts_parallel(x, ids, weights.float(), gate_up, down, virtual, **options)
        y.sum().backward()
    assert y.shape == x.shape and y.dtype == dtype
    for t in (x, weights, *(low if adapted else (gate_up, down))):
        assert t.grad.shape == t.shape and t.grad.dtype == dtype and t.grad.device == torch.device("npu:0")
    assert not watch.record.wrong and asked == [(2, RANKS, 3)]
    called = Counter(func.name().partition("::")[2] for func, _, _ in watch.calls)
    if adapted:  # forward 2 and 4 of adapters, backward 2 and 6, and the gradients of four of them
        assert not FUSED & set(called) and called["npu_grouped_matmul"] == 18
    elif way == "fused":
        assert {name: called[name] for name in FUSED} == dict.fromkeys(FUSED, 2)
        assert called["npu_grouped_matmul"] == 2  # the weights' gradients
        for func, args, given in watch.calls:
            if func.name().removeprefix("npu::") in FUSED:
                routed = sum(args[4] if "alltoallv_gmm" in func.name() else args[5])
                others = {name: value for name, value in given.items() if "gmm_" not in name and "out" not in name}
                check_exchange(*args, given.get("trans_gmm_weight", False), routed, others)
    else:
        assert not FUSED & set(called) and called["npu_grouped_matmul"] == 6
    received = round(tokens * top_k // 16 * imbalance) * 16
    grouped = [args[0][0].shape for func, args, _ in watch.calls if func.name() == "npu::npu_grouped_matmul"]
    assert {max(shape) for shape in grouped} == {received}


def adapters(low: list[torch.Tensor]) -> ExpertAdapters | None:
    return ExpertAdapters(1.7, tuple(low[:2]), tuple(low[2:])) if low else None


def problem(top_k: int, tokens: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(top_k)
    total, rand = sum(tokens), functools.partial(torch.randn, generator=generator)
    ids = torch.rand(total, 16, generator=generator)
    ids[:, 5] = -1  # an expert without tokens
    shapes = [(total, HIDDEN), (total, HIDDEN), (total, top_k), *stacks(16)]
    return [ids.topk(top_k).indices, *(rand(s).to(dtype) for s in shapes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@ADAPTED
def test_numbers(way, adapted, dtype, documented_bodies):
    if way == "fused" and dtype is torch.float32:
        dtype = torch.float16
    module, top_k = WAYS[way]
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    ids, probe, x, weights, *experts = problem(top_k, tokens, dtype)
    experts = experts if adapted else experts[:2]
    whole = [t.detach().double().requires_grad_() for t in (x, weights, *experts)]
    truth = reference.moe_experts(whole[0], ids, *whole[1:4], adapters(whole[4:]))
    truth.backward(probe.double())
    found = [None] * RANKS

    def run() -> None:
        rank = dist.get_rank()
        mine, here = slice(sum(tokens[:rank]), sum(tokens[: rank + 1])), slice(2 * rank, 2 * rank + 2)
        parts = x[mine], weights[mine], *(t[here] for t in experts)
        leaves = [t.detach().clone().requires_grad_() for t in parts]
        its = adapters(leaves[4:])
        y = module.moe_experts_parallel(leaves[0], ids[mine], *leaves[1:4], dist.group.WORLD, adapters=its)
        y.backward(probe[mine])
        found[rank] = [y.detach(), *(t.grad for t in leaves)]

    threads.run(RANKS, run)
    tolerance = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for parts, exact in zip(zip(*found, strict=True), (truth, *(t.grad for t in whole)), strict=True):
        ours = torch.cat(parts)
        assert ours.dtype == dtype and error(ours, exact) <= tolerance, error(ours, exact)
    assert not any(torch.cat(parts)[5].any() for parts in [*zip(*found, strict=True)][3:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": 4}, "parallel.expert_parallel_size 4 is not one of 8, 16, 32, 64, 128"),
        ({"experts": 33}, "33 experts a rank are more than 32"),
        ({"experts": 17, "ranks": 16}, "272 experts are more than 256"),
        ({"top_k": 10}, "10 experts a token are not 2 to 8"),
        ({"dtype": torch.float32}, "torch.float32 is neither bfloat16 nor float16"),
        ({"tokens": 0}, "a rank has no tokens"),
        ({"adapters": ExpertAdapters(1.0)}, "the experts have adapters, which .*"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_unsupported_inputs_raise(change, words, monkeypatch):
    case = {"ranks": 8, "experts": 2, "top_k": 2, "dtype": torch.bfloat16, "tokens": 3, "adapters": None} | change
    monkeypatch.setattr(dist, "get_world_size", lambda group: case["ranks"])
    x = torch.zeros(case["tokens"], 4, dtype=case["dtype"])
    ids = torch.zeros(case["tokens"], case["top_k"], dtype=torch.long)
    gate_up, its = torch.zeros(case["experts"], 8, 4), case["adapters"]
    with pytest.raises(kernels.KernelError, match=f"alltoallv_gmm does not take this: {words}; auto takes it"):
        fused_exchange.moe_experts_parallel(x, ids, ids.float(), gate_up, None, None, adapters=its)


def test_the_fused_exchange_must_be_selected_by_name():
    auto, named = kernels.select("npu"), kernels.select("npu", {"moe_experts_parallel": "alltoallv_gmm"})
    assert auto.moe_experts_parallel.keywords == {"primitives": npu}
    assert named.moe_experts_parallel is fused_exchange.moe_experts_parallel


def test_the_communicator_takes_the_global_rank(monkeypatch):
    monkeypatch.undo()  # of the name above

    class Group:
        def _get_backend(self, device):
            assert device == torch.device("npu")
            return self

        def get_hccl_comm_name(self, rank):
            return f"of {rank}"

    monkeypatch.setattr(npu, "get_rank", lambda: 11)
    assert npu.communicator(Group()) == "of 11"


# ── What the fused exchange refuses ───────────────────────────────────────────────────────────────


def of(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


COUNTS = [1] * 16
EXCHANGE = {
    "x": of(16, 4),
    "weight": of(2, 4, 8),
    "hcom": "experts",
    "ranks": 8,
    "send": COUNTS,
    "receive": COUNTS,
    "is_transposed": False,
    "routed": 16,
    "others": {"mm_x": None, "trans_mm_weight": False},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": of(16, 4).float(), "weight": of(2, 4, 8).float()}, "gmm_x torch.float32"),
        ({"weight": of(2, 4, 8).half()}, "gmm_weight torch.float16"),
        ({"x": of(4, 16).T}, "axes or strides"),
        ({"weight": of(2, 8, 4).mT}, "axes or strides"),
        ({"is_transposed": True}, "different widths"),
        ({"weight": of(2, 4, 65536)}, "an axis of 65536"),
        ({"ranks": 4}, "4 ranks"),
        ({"weight": of(33, 4, 8)}, "33 experts"),
        ({"weight": of(17, 4, 8), "ranks": 16}, "17 experts on each of 16 ranks"),
        ({"receive": COUNTS[:8]}, "16 and 8 counts"),
        ({"send": [2] * 16}, "counts of 32 for 16 rows"),
        ({"routed": 0}, "0 rows"),
        ({"routed": 52_428_800}, "52428800 rows"),
        ({"hcom": "x" * 128}, "hcom's length"),
        ({"others": {"mm_x": of(4, 4)}}, "a shared expert"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_fused_exchange_refuses(change, said):
    check_exchange(**EXCHANGE)
    with pytest.raises(AssertionError, match=said):
        check_exchange(**EXCHANGE | change)


@pytest.mark.parametrize("op", [alltoallv_gmm, gmm_alltoallv])
def test_counts_on_which_the_ranks_disagree_are_refused(op):
    """Rank 3 expects one row more of rank 0 and one less of rank 1, so that the sums are right."""

    def run(disagrees: bool) -> None:
        receive = COUNTS.copy()
        if dist.get_rank() == 3 and disagrees:
            receive[0], receive[2] = 2, 0
        op(of(16, 4), of(2, 4, 8), "experts", 8, COUNTS, receive)

    threads.run(8, lambda: run(False))
    with pytest.raises(AssertionError, match="the others send"):
        threads.run(8, lambda: run(True))
