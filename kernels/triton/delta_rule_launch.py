"""The launches of the gated delta rule's kernels, each registered as a torch operator.

A function per operator allocates its outputs, for the launch and for fake tensors alike. There are
N chunks of C tokens; C is a dimension of `gates`.
"""

import torch
from torch import Tensor

from kernels.triton import delta_rule_backward, delta_rule_forward, delta_rule_gradients
from kernels.triton.tiles import operator, power_of_two, programs


def sizes(k: Tensor, v: Tensor) -> dict[str, int]:
    return {"Hk": k.shape[1], "Hv": v.shape[1], "Dk": k.shape[2], "Dv": v.shape[2]}


def _prepared(k: Tensor, g: Tensor, chunks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    gates, norms = (k.new_empty(len(chunks), x.shape[1], 2, size, dtype=torch.float32) for x in (g, k))
    return gates, norms


@operator("delta_rule::prepare", lambda q, k, g, beta, chunks, size: _prepared(k, g, chunks, size))
def prepare(q: Tensor, k: Tensor, g: Tensor, beta: Tensor, chunks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """-> gates [N, Hv, 2, C], norms [N, Hk, 2, C], fp32"""
    gates, norms = _prepared(k, g, chunks, size)
    heads = g.shape[1]
    delta_rule_forward.prepare[(programs(len(chunks), k.device),)](
        q, k, g, beta, chunks, gates, norms, len(chunks), q.stride(0), k.stride(0),
        Hk=k.shape[1], Hv=heads, HEADS=power_of_two(heads), Dk=k.shape[2], C=size,
    )  # fmt: skip
    return gates, norms


def _inverses(k: Tensor, gates: Tensor) -> Tensor:
    N, Hv, _, C = gates.shape
    return k.new_empty(N, Hv, C, C)


@operator("delta_rule::invert", lambda k, gates, norms, chunks: _inverses(k, gates))
def invert(k: Tensor, gates: Tensor, norms: Tensor, chunks: Tensor) -> Tensor:
    """-> inverse [N, Hv, C, C]"""
    inverse, (N, Hv, _, C) = _inverses(k, gates), gates.shape
    delta_rule_forward.invert[(programs(N * k.shape[1], k.device, products=True),)](
        k, chunks, gates, norms, inverse, N, k.stride(0), Hk=k.shape[1], Hv=Hv, Dk=k.shape[2], C=C
    )
    return inverse


def _of_scan(
    k: Tensor, v: Tensor, gates: Tensor, sequences: Tensor, columns: int
) -> tuple[tuple[int], int, dict[str, int]]:
    """-> grid, number of sequences, sizes"""
    count = len(sequences) - 1
    tasks = count * v.shape[1] * (v.shape[2] // columns)
    return (programs(tasks, v.device, products=True),), count, sizes(k, v) | {"BV": columns, "C": gates.shape[3]}


@operator("delta_rule::scan", lambda q, k, v, *others: v.new_empty(v.shape))
def scan(
    q: Tensor, k: Tensor, v: Tensor, inverse: Tensor, gates: Tensor, norms: Tensor, sequences: Tensor, columns: int
) -> Tensor:
    """-> out [T, Hv, Dv]; columns: of a state, per program"""
    out = v.new_empty(v.shape)
    grid, count, scan_sizes = _of_scan(k, v, gates, sequences, columns)
    delta_rule_forward.scan[grid](
        q, k, v, inverse, gates, norms, sequences, out, k.shape[2] ** -0.5,
        count, q.stride(0), k.stride(0), v.stride(0), **scan_sizes,
    )  # fmt: skip
    return out


def _states(k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    return v.new_empty(len(gates), v.shape[1], k.shape[2], v.shape[2])


@operator("delta_rule::states", lambda k, v, inverse, gates, *others: _states(k, v, gates))
def states(
    k: Tensor, v: Tensor, inverse: Tensor, gates: Tensor, norms: Tensor, sequences: Tensor, columns: int
) -> Tensor:
    """-> the states that enter each chunk [N, Hv, Dk, Dv]"""
    entering, (grid, count, scan_sizes) = _states(k, v, gates), _of_scan(k, v, gates, sequences, columns)
    delta_rule_backward.states[grid](
        k, v, inverse, gates, norms, sequences, entering, count, k.stride(0), v.stride(0), **scan_sizes
    )
    return entering


def _grad_states(k: Tensor, v: Tensor, gates: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    parts = v.shape[2] // columns * k.shape[2]
    return _states(k, v, gates), v.new_empty(len(gates), v.shape[1], parts, dtype=torch.float32)


@operator(
    "delta_rule::grad_states",
    lambda q, k, inverse, gates, norms, grad, entering, sequences, columns: _grad_states(k, grad, gates, columns),
)
def grad_states(
    q: Tensor, k: Tensor, inverse: Tensor, gates: Tensor, norms: Tensor, grad: Tensor,
    entering: Tensor, sequences: Tensor, columns: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> gradients of the leaving states [N, Hv, Dk, Dv], the decay's share [N, Hv, parts] fp32"""
    leaving, through = _grad_states(k, grad, gates, columns)
    grid, count, scan_sizes = _of_scan(k, grad, gates, sequences, columns)
    delta_rule_backward.grad_states[grid](
        q, k, inverse, gates, norms, grad, entering, sequences, leaving, through, k.shape[2] ** -0.5,
        count, q.stride(0), k.stride(0), **scan_sizes,
    )  # fmt: skip
    return leaving, through


def _gradients(k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    part_q, part_k = (k.new_empty(*v.shape[:2], k.shape[2]) for _ in range(2))
    grad_gates = gates.new_empty(len(gates), v.shape[1], 3, gates.shape[3])
    return part_q, part_k, v.new_empty(v.shape), grad_gates


@operator("delta_rule::gradients", lambda q, k, v, inverse, gates, *others: _gradients(k, v, gates))
def gradients(
    q: Tensor, k: Tensor, v: Tensor, inverse: Tensor, gates: Tensor, norms: Tensor,
    grad: Tensor, entering: Tensor, leaving: Tensor, chunks: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of q, k per V head [T, Hv, Dk], of v [T, Hv, Dv], of gates [N, Hv, 3, C] fp32"""
    outputs = _gradients(k, v, gates)
    delta_rule_gradients.gradients[(programs(len(chunks) * v.shape[1], v.device, products=True),)](
        q, k, v, inverse, gates, norms, grad, entering, leaving, chunks, *outputs, k.shape[2] ** -0.5,
        len(chunks), q.stride(0), k.stride(0), v.stride(0), **sizes(k, v), C=gates.shape[3],
    )  # fmt: skip
    return outputs


def _finished(part_q: Tensor, key_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, Hv, Dk = part_q.shape
    heads = 0 if key_heads == Hv else key_heads  # without sharing there is nothing to sum
    grad_g, grad_beta = (part_q.new_empty(T, Hv, dtype=torch.float32) for _ in range(2))
    grad_q, grad_k = (part_q.new_empty(T, heads, Dk) for _ in range(2))
    return grad_g, grad_beta, grad_q, grad_k


@operator(
    "delta_rule::finish", lambda grad_gates, through, part_q, part_k, chunks, key_heads: _finished(part_q, key_heads)
)
def finish(
    grad_gates: Tensor, through: Tensor, part_q: Tensor, part_k: Tensor, chunks: Tensor, key_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of g, beta [T, Hv] fp32; of q, k [T, Hk, Dk], or [T, 0, Dk] if Hk = Hv"""
    outputs, (_, Hv, Dk) = _finished(part_q, key_heads), part_q.shape
    delta_rule_gradients.finish[(programs(len(chunks), part_q.device),)](
        grad_gates, through, part_q, part_k, chunks, *outputs, len(chunks),
        Hk=key_heads, Hv=Hv, HEADS=power_of_two(Hv), PARTS=through.shape[2], Dk=Dk, C=grad_gates.shape[3],
    )  # fmt: skip
    return outputs
