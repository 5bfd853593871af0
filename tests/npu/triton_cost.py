"""Bytes and launches of the delta rule's Triton kernels, by the interpreter, beside fla-core's.

As Markdown: bytes of the kernels' loads and stores per token and V head, for heads of 128, two V
heads per K head, bf16. Transfers between cube and vector cores inside a kernel are not included, on
either side.
"""

from collections import Counter
from collections.abc import Iterator

import interpreter
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels

TOKENS, Hk, Hv, D = 256, 1, 2, 128
# fla-core 0.6.0, triton_ascend, read from its launches: each kernel reads each input and writes
# each output once, at the least (its smaller tiles are read again), gates and norms left out;
# launches with the copies, fills and sums around the kernels. Forward: 2 l2norm, cumsum, kkt into
# fp32 zeros, solve_tril into zeros, w and u, states and values, output; gates transposed for each.
# Backward: w and u, states and values again, dv, state gradients, dq dk dw dg, <h, dh>, six kernels
# back through w and u, sums over the V heads of a K head, two additions, cumsum, 2 l2norm; gates
# transposed.
FLA = {"forward": (16, 6016), "backward": (31, 17408)}


class Moved(TorchDispatchMode):
    """Bytes of each operator's inputs and outputs, without views; of our kernels as counted."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Counter = Counter()
        self.written: Counter = Counter()
        self.launches: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        interpreter.moved.update(read=0, written=0)
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace != "prim":
            name, ours = func.name(), func.namespace == "delta_rule"
            self.read[name] += interpreter.moved["read"] if ours else _bytes((args, kwargs))
            self.written[name] += interpreter.moved["written"] if ours else _bytes(out)
            self.launches[name] += 1
        return out


def _bytes(some) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(some) if isinstance(x, torch.Tensor))


def cost(op) -> dict[str, Moved]:
    half = {"dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = torch.randn(TOKENS, Hk, D, **half), torch.randn(TOKENS, Hk, D, **half), torch.randn(TOKENS, Hv, D, **half)
    g, beta = (-torch.rand(TOKENS, Hv)).requires_grad_(), torch.rand(TOKENS, Hv, requires_grad=True)
    with Moved() as forward:
        out = op(q, k, v, g, beta, torch.tensor([0, TOKENS]))
    grad = torch.randn_like(out)
    with Moved() as backward:
        out.backward(grad)
    return {"forward": forward, "backward": backward}


def lines(ours: dict[str, Moved]) -> Iterator[str]:
    native, each = cost(kernels.chunk_gated_delta_rule), TOKENS * Hv
    yield "| kernel | read | written | bytes a token and V head |\n| --- | --- | --- | --- |"
    for moved in ours.values():
        for name in moved.read:
            if name.startswith("delta_rule::"):
                read, written = moved.read[name] / each, moved.written[name] / each
                yield f"| {name.removeprefix('delta_rule::')} | {read:,.0f} | {written:,.0f} | {read + written:,.0f} |"
    yield "\n| delta rule | bytes, forward + backward | launches, forward + backward |\n| --- | --- | --- |"
    for whose, found in (("ours", ours), ("native", native)):
        moved = [(m.read.total() + m.written.total()) / each for m in found.values()]
        launches = [m.launches.total() for m in found.values()]
        yield f"| {whose} | {' + '.join(f'{x:,.0f}' for x in moved)} | {' + '.join(map(str, launches))} |"
    (launched, moved), (launched_back, moved_back) = FLA.values()
    yield f"| fla-core 0.6.0, triton_ascend | {moved:,} + {moved_back:,} | {launched} + {launched_back} |"
    yield f"\nNative: {TOKENS} tokens, one sequence; its launches grow with the chunks of the longest sequence."
