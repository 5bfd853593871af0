"""Experts spread over real processes: outputs and all gradients are those of one process that has
all tokens and experts.

One group of four processes runs every case and leaves what it found; the tests read that.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import spawn
from ports import free_port
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import moe_parallel, reference
from kernels.moe_lora import ExpertAdapters
from kernels.recompute_cache import RecomputeCache
from rehearse.communication import balanced_counts

INPUTS = ("x", "weights", "gate_up_proj", "down_proj")
ADAPTERS = ("gate_up_a", "gate_up_b", "down_a", "down_b")
E, H, INNER, RANK, SCALE = 8, 16, 24, 8, 1.7
SPREAD, ONE_RANK, IDLE = "all experts", "the experts of one rank", "every third expert"
# ep, top_k; with ep <= top_k tokens are all-gathered
WAYS = {
    "all-to-all, 4": (4, 2),
    "all-to-all, 2": (2, 1),
    "all-gather, 4": (4, 5),
    "all-gather, 2": (2, 3),
    "all-gather, as many": (4, 4),
}
TOKENS = {  # per rank
    "equal": ([12, 12, 12, 12], SPREAD),
    "unequal": ([1, 7, 30, 3], SPREAD),
    "idle experts": ([9, 9, 9, 9], IDLE),
    "all to one rank": ([9, 4, 9, 9], ONE_RANK),
    "one rank without tokens": ([5, 0, 6, 0], SPREAD),
    "no tokens": ([0, 0, 0, 0], SPREAD),
}
FROZEN = {
    "x": ("x",),
    "weights": ("weights",),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj",),
    "experts": INPUTS[2:],
    "all but gate_up": ("x", "weights", "down_proj"),
}
ADAPTED = {  # those given, and what is frozen beside them
    "both": (ADAPTERS, INPUTS[2:]),
    "both, all trained": (ADAPTERS, ()),
    "gate_up": (ADAPTERS[:2], INPUTS[2:]),
    "down": (ADAPTERS[2:], (*INPUTS[2:], "x")),
    "both, A frozen": (ADAPTERS, (*INPUTS[2:], "x", "gate_up_a", "down_a")),
    "both, B frozen": (ADAPTERS, (*INPUTS[2:], "weights", "gate_up_b", "down_b")),
}
TRAFFIC = {"": (), "adapters": ADAPTERS, "adapters of down": ADAPTERS[2:]}
FOUR = ("all-to-all, 4", "all-gather, 4")
CASES = [  # way, tokens, dtype, frozen, adapters
    *((way, tokens, "fp32", (), ()) for way in WAYS for tokens in TOKENS),
    *((way, "unequal", "bf16", (), ()) for way in WAYS),
    *((way, "equal", "fp32", frozen, ()) for way in FOUR for frozen in FROZEN.values()),
    *((way, tokens, "fp32", INPUTS[2:], ADAPTERS) for way in WAYS for tokens in TOKENS),
    *((way, "unequal", "bf16", INPUTS[2:], ADAPTERS) for way in WAYS),
    *((way, "unequal", "fp32", frozen, adapters) for way in FOUR for adapters, frozen in list(ADAPTED.values())[1:]),
]


class Watch(TorchDispatchMode):
    """Records every collective: its name and the bytes this rank sends, by row shape."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...], torch.dtype, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.__name__.partition(".")[0]
            sent, group = args[1:3]
            ep, rank = dist.ProcessGroup.unbox(group).size(), dist.ProcessGroup.unbox(group).rank()
            if name == "alltoall_base_":
                splits = list(args[4]) or [len(sent) // ep] * ep
                rows = sum(splits) - splits[rank]
            else:
                assert name == "_allgather_base_", name
                rows = (ep - 1) * len(sent)
            size = sent[:1].numel() * sent.element_size() if len(sent) else 0
            self.seen.append((name, tuple(sent.shape), sent.dtype, rows * size))
        return func(*args, **(kwargs or {}))


def problem(ep: int, top_k: int, tokens: list[int], pattern: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, ids and weights of the tokens of all ranks, and all experts."""
    torch.manual_seed(sum(tokens) + top_k)
    total = sum(tokens[:ep])
    if pattern == SPREAD:
        ids = torch.rand(total, E).topk(top_k).indices
    else:
        few = torch.arange(E)[-(E // ep) :] if pattern == ONE_RANK else torch.arange(0, E, 3)
        ids = few[torch.rand(total, top_k).mul(len(few)).long()]
    tensors = [torch.randn(total, H), torch.rand(total, top_k), torch.randn(E, 2 * INNER, H), torch.randn(E, H, INNER)]
    shapes = [(E, RANK, H), (E, 2 * INNER, RANK), (E, RANK, INNER), (E, H, RANK)]
    x, weights, *stacks = (t.to(dtype) for t in [*tensors, *(torch.randn(shape) for shape in shapes)])
    return [x, ids, weights, *stacks, torch.randn(total, H).to(dtype)]


def leaves(tensors: list[torch.Tensor], frozen: tuple[str, ...], adapters: tuple[str, ...]) -> list[torch.Tensor]:
    """The inputs, and A and B of the projections, of which `adapters` are used."""
    return [
        t.detach().clone().requires_grad_(n not in frozen and (n in INPUTS or n in adapters))
        for n, t in zip((*INPUTS, *ADAPTERS), tensors, strict=True)
    ]


def given(tensors: list[torch.Tensor], adapters: tuple[str, ...]) -> ExpertAdapters | None:
    gate_up, down = (tuple(tensors[i : i + 2]) if ADAPTERS[i] in adapters else None for i in (0, 2))
    return ExpertAdapters(SCALE, gate_up, down) if adapters else None


def run(op, inputs: list[torch.Tensor], ids, probe, adapters: tuple[str, ...], *rest) -> list[torch.Tensor | None]:
    x, *others = inputs[:4]
    y = op(x, ids, *others, *rest, adapters=given(inputs[4:], adapters))
    y.backward(probe)
    return [y.detach(), *(t.grad for t in inputs)]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12))


def worker(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found = {}
    for way, tokens, dtype, frozen, adapters in CASES:
        ep, top_k = WAYS[way]
        group = dist.group.WORLD if ep == 4 else pairs[rank // 2]
        counts, pattern = TOKENS[tokens]
        wanted = torch.float32 if dtype == "fp32" else torch.bfloat16
        x, ids, weights, *stacks, probe = problem(ep, top_k, counts, pattern, wanted)
        me = rank % ep
        mine = slice(sum(counts[:me]), sum(counts[: me + 1]))
        experts = slice(me * E // ep, (me + 1) * E // ep)
        parts = leaves([x[mine], weights[mine], *(t[experts] for t in stacks)], frozen, adapters)
        ours = run(kernels.moe_experts_parallel, parts, ids[mine], probe[mine], adapters, group)
        whole = leaves([x, weights, *stacks], frozen, adapters)
        one = run(kernels.moe_experts, whole, ids, probe, adapters)
        exact = leaves([t.detach().double() for t in whole], frozen, adapters)
        truth = run(reference.moe_experts, exact, ids, probe.double(), adapters) if sum(counts) else one
        names, cuts = ("y", *INPUTS, *ADAPTERS), (mine, mine, mine, *[experts] * 6)
        for name, cut, a, b, c in zip(names, cuts, ours, one, truth, strict=True):
            key = way, tokens, dtype, frozen, adapters, name
            if b is None:
                found[key] = None if a is None else "a gradient of what is frozen"
            elif a is None or a.shape != b[cut].shape or a.dtype != b.dtype:
                found[key] = f"{a} beside {b[cut]}"
            else:
                found[key] = error(a, b[cut]), error(a, c[cut]), error(b[cut], c[cut])
    found["traffic"] = {(way, a): traffic(way, a, rank, pairs[rank // 2]) for way in WAYS for a in TRAFFIC.values()}
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


def traffic(way: str, adapters: tuple[str, ...], rank: int, pair: dist.ProcessGroup) -> dict:
    """Bytes that a layer sends with and without recomputation, in bf16, and how often it syncs.

    With adapters the weights are frozen.
    """
    ep, top_k = WAYS[way]
    group = dist.group.WORLD if ep == 4 else pair
    x, ids, weights, *stacks, probe = problem(ep, top_k, [12] * 4, SPREAD, torch.bfloat16)
    me = rank % ep
    mine, experts = slice(12 * me, 12 * me + 12), slice(me * E // ep, (me + 1) * E // ep)
    tensors = [x[mine], weights[mine].float(), *(t[experts] for t in stacks)]
    parts = leaves(tensors, INPUTS[2:] if adapters else (), adapters)
    trained = [t for t in parts if t.requires_grad]
    waited = []

    def read(counts, tokens, k):
        waited.append((tokens, k))
        return moe_parallel.read_counts(counts, tokens, k)

    def layer(recompute_cache, x, *others):
        its = given(others[3:], adapters)
        return kernels.moe_experts_parallel(
            x, ids[mine], *others[:3], group, recompute_cache, count_reader=read, adapters=its
        )

    is_mine = ids // (E // ep) == me
    found = {"away": int((~is_mine[mine]).sum()), "of others": int(is_mine.sum() - is_mine[mine].sum())}
    found["rows"], own = int(is_mine.sum()), {t.untyped_storage().data_ptr() for t in (*parts[2:], ids)}
    saved = {}
    with Watch() as watch:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
            y = layer(None, *parts)
        found["forward"], watch.seen = watch.seen, []
        found["saved"] = sum(
            t.untyped_storage().nbytes() for t in saved.values() if t.untyped_storage().data_ptr() not in own
        )
        y.backward(probe[mine])
        found["backward"] = watch.seen
    found["waits"], grads = len(waited), [t.grad.clone() for t in trained]
    waited.clear()
    for t in parts:
        t.grad = None
    recompute_cache = RecomputeCache()
    with Watch() as watch:
        again = checkpoint(layer, recompute_cache, *parts, use_reentrant=False, context_fn=recompute_cache.contexts)
        found["first run"], watch.seen = watch.seen, []
        again.backward(probe[mine])
        found["second run"] = watch.seen
    found["waits of two runs"] = len(waited)
    found["same"] = torch.equal(y, again) and all(torch.equal(t.grad, g) for t, g in zip(trained, grads, strict=True))
    for t in parts:
        t.grad = None
    ends_here = RecomputeCache(ends_with_experts=True)
    with Watch() as watch:
        last = checkpoint(layer, ends_here, *parts, use_reentrant=False, context_fn=ends_here.contexts)
        watch.seen = []
        last.backward(probe[mine])
        found["second run of the last"] = watch.seen
    alike = torch.equal(y, last) and all(torch.equal(t.grad, g) for t, g in zip(trained, grads, strict=True))
    found["the same where nothing follows"] = alike
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """Per rank."""
    folder = tmp_path_factory.mktemp("experts")
    spawn(worker, free_port(), folder, ranks=4)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


def case_name(case: tuple) -> str:
    way, tokens, dtype, frozen, adapters = case
    return ", ".join([way, tokens, dtype, *("no " + name for name in frozen), *adapters])


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_ranks_equal_one_process(found, case):
    frozen, adapters = case[3:]
    for rank, its in enumerate(found):
        for name in ("y", *INPUTS, *ADAPTERS):
            result = its[(*case, name)]
            if name in frozen or (name in ADAPTERS and name not in adapters):
                assert result is None, (rank, name, result)
                continue
            assert isinstance(result, tuple), (rank, name, result)
            beside_one, beside_truth, error_of_one = result
            if case[2] == "fp32":
                assert beside_one <= 1e-5, (rank, name, result)
            else:  # a share is rounded once more than a row
                assert beside_truth <= 1.5 * error_of_one + 1e-4, (rank, name, result)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adapters", TRAFFIC.values(), ids=TRAFFIC)
def test_bytes_sent(found, way, adapters):
    """Exact, per collective; each way at most top_k * T * H * 2 bytes of hidden states a rank."""
    ep, top_k = WAYS[way]
    for rank, its in enumerate(found[rank]["traffic"][way, adapters] for rank in range(4)):
        counts = "alltoall_base_", torch.int64, (ep - 1) * (E // ep + 1) * 8
        if ep > top_k:  # rows to other ranks' experts, and rows back to other ranks
            name, away, others = "alltoall_base_", its["away"], its["of others"]
            forward = [(name, torch.bfloat16, away * H * 2), (name, torch.bfloat16, others * H * 2)]
            backward = [(name, torch.float32, away * 4), *forward, (name, torch.float32, others * 4)]
            # the rows of all ranks each way
            rows = max(sum(found[r]["traffic"][way, adapters][key] for r in range(ep)) for key in ("away", "of others"))
            assert 0 < rows * H * 2 <= top_k * 12 * ep * H * 2
        else:  # all tokens to all ranks, and a share of each back; expert ids and weights as fp32
            rows, scalars = (ep - 1) * 12 * H * 2, (ep - 1) * 12 * top_k * 4
            tokens = [("_allgather_base_", torch.bfloat16, rows), ("alltoall_base_", torch.bfloat16, rows)]
            forward = [("_allgather_base_", torch.float32, 2 * scalars), *tokens]
            backward = [*tokens, ("alltoall_base_", torch.float32, scalars)]
            assert 0 < rows <= top_k * 12 * H * 2
        sent = {
            when: [(name, dtype, size) for name, _, dtype, size in its[when]]
            for when in ("forward", "backward", "first run", "second run", "second run of the last")
        }
        assert sent["forward"] == sent["first run"] == [counts, *forward], rank
        assert sent["backward"] == backward, rank
        assert sent["second run"] == [*forward, *backward], rank  # without a second exchange of counts
        assert sent["second run of the last"] == [*forward[:-1], *backward], rank  # nor of what the experts return


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adapters", TRAFFIC.values(), ids=TRAFFIC)
def test_a_recomputed_layer_syncs_once(found, way, adapters):
    for its in (found[rank]["traffic"][way, adapters] for rank in range(4)):
        assert its["waits"] == its["waits of two runs"] == 1
        assert its["same"] and its["the same where nothing follows"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adapters", TRAFFIC.values(), ids=TRAFFIC)
def test_backward_saves_little(found, way, adapters):
    """Arrived rows or gathered tokens, gate_up's output and a few numbers per choice are saved.

    The rows only if gate_up is trained, or has an adapter.
    """
    ep, top_k = WAYS[way]
    for its in (found[rank]["traffic"][way, adapters] for rank in range(4)):
        tokens = its["rows"] if ep >= top_k else ep * 12
        choices = 12 * top_k * (1 if ep > top_k else ep)  # row_of_slot, weights and the gathered ids
        own = 8 + (4 if ep <= top_k else 0)
        rest = 8 * its["rows"] if ep > top_k else 8 * E // ep  # the regroup indices, or where each expert's rows end
        tokens *= adapters != ADAPTERS[2:]
        assert its["saved"] == tokens * H * 2 + its["rows"] * 2 * INNER * 2 + choices * own + rest


@pytest.mark.parametrize("counts", [[[3]], [[0, 2], [1, 0], [0, 0]], [[2, 0, 1], [0, 0, 4]], [[0, 0], [0, 0]]], ids=str)
def test_regroup_indices(counts):
    """From rank-major to expert-major order and back."""
    counts = torch.tensor(counts)
    parts = torch.arange(int(counts.sum())).split(counts.flatten().tolist())
    wanted = torch.cat([part for expert in range(counts.shape[1]) for part in parts[expert :: counts.shape[1]]])
    by_expert, by_rank = moe_parallel.regroup_indices(counts, int(counts.sum()))
    assert by_expert.tolist() == wanted.tolist()
    assert wanted[by_rank].tolist() == list(range(len(wanted)))


@pytest.mark.parametrize("ep", [2, 8])
def test_balanced_counts(ep):
    """The stand-in for counts: all rows are sent, and as many arrive, or a factor more."""
    counts = torch.full((2, ep, 16 // ep + 1), -1)
    sent, received = balanced_counts(counts, 20, 4)
    assert torch.tensor([sent, received]).shape == counts.shape
    assert all(part[-1] == 20 for part in (*sent, *received))
    each = [n for part in sent for n in part[:-1]]
    assert sum(each) == 80 and set(each) == {5}
    _, more = balanced_counts(counts, 20, 4, imbalance=1.4)
    assert sum(n for part in more for n in part[:-1]) == 112


def test_one_rank_is_plain_experts(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    x, ids, weights, gate_up, down, *others, _ = problem(1, 2, [9], SPREAD, torch.float32)
    for adapters in (None, given(others, ADAPTERS)):
        ours = kernels.moe_experts_parallel(x, ids, weights, gate_up, down, None, adapters=adapters)
        assert torch.equal(ours, kernels.moe_experts(x, ids, weights, gate_up, down, adapters=adapters))
