"""The primitives in plain torch on which the algorithms of this package are built.

On a CPU elementwise work goes through blocks of rows, so that its fp32 temporaries stay in the
processor's cache.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kernels.features import HAS_GROUPED_FLASH

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
BLOCK = 1 << 18  # elements of a block: 1 MB in fp32


def working_dtype(x: Tensor) -> torch.dtype:
    """fp32 for half precision; fp64 stays, for gradcheck."""
    return torch.promote_types(x.dtype, torch.float32)


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor [N, …], in blocks sized by the first; off the CPU one block."""
    first = tensors[0]
    rows = max(1, BLOCK * max(1, len(first)) // max(1, first.numel())) if first.is_cpu else max(1, len(first))
    return zip(*(x.split(rows) for x in tensors), strict=True)


# -- experts ---------------------------------------------------------------------------------------


def permute(x: Tensor, topk_ids: Tensor, experts: int, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], topk_ids [T, K] -> rows [T*K, H] by expert, row_of_slot [T*K] int32, ends [E].

    The rows of expert e end before row ends[e]. `count` limits the rows: the slots of ids >= E sort
    last, and then have no rows.
    """
    ids, order = topk_ids.flatten().sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device, dtype=ids.dtype), right=True)
    slots = torch.arange(len(order), device=order.device, dtype=torch.int32)
    row_of_slot = torch.empty_like(slots).scatter_(0, order, slots)
    return x.index_select(0, order[:count] // topk_ids.shape[1]), row_of_slot, ends


def histogram(topk_ids: Tensor, experts: int) -> Tensor:
    """topk_ids [T, K] -> [E] int64, how often each expert was chosen."""
    ids = topk_ids.flatten().sort().values
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device, dtype=ids.dtype), right=True)
    return ends.diff(prepend=ends.new_zeros(1))


def sorted_rows(
    x: Tensor, topk_ids: Tensor, row_of_slot: Tensor, out: Tensor | None = None, count: int | None = None
) -> Tensor:
    """The rows of permute, again, from its row_of_slot; written into `out` [T*K, H] if given."""
    slots = torch.arange(len(row_of_slot), device=row_of_slot.device)
    token = torch.empty_like(slots).scatter_(0, row_of_slot.long(), slots // topk_ids.shape[1])
    return torch.index_select(x, 0, token[:count], out=out)


def weight_of_row(weights: Tensor, row_of_slot: Tensor) -> Tensor:
    """weights [T, K], row_of_slot [T*K] -> [T*K, 1] in the order of the rows."""
    return torch.empty_like(row_of_slot, dtype=weights.dtype).scatter_(0, row_of_slot.long(), weights.flatten())[
        :, None
    ]


def weigh(hidden: Tensor, grad_hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """hidden, grad_hidden [N, I], weight [N, 1] -> their dot products [N]; grad_hidden, weighed.
    Hidden is weighed in place, and grad_hidden may be.
    """
    wide = working_dtype(hidden)
    dots = torch.empty_like(weight[:, 0])
    for h, g, w, dot in row_blocks(hidden, grad_hidden, weight.to(wide), dots):
        wide_h, wide_g = h.to(wide), g.to(wide)
        dot.copy_(torch.linalg.vecdot(wide_h, wide_g))
        h.copy_(wide_h.mul_(w))
        g.copy_(wide_g.mul_(w))
    return dots, grad_hidden


def permute_backward(grad_rows: Tensor, row_of_slot: Tensor, top_k: int) -> Tensor:
    """grad_rows [T*K, H] -> grad_x [T, H], the sum over the K rows of a token in fp32."""
    ones = torch.ones(len(row_of_slot) // top_k, top_k, dtype=working_dtype(grad_rows), device=grad_rows.device)
    return unpermute(grad_rows, row_of_slot, ones)


def unpermute(rows: Tensor, row_of_slot: Tensor, weights: Tensor) -> Tensor:
    """rows [T*K, H], weights [T, K] -> y [T, H], the weighted sums over K, computed in fp32.

    Slots whose row is past the last one count as zero.
    """
    if len(rows) < len(row_of_slot):
        weights = weights.masked_fill((row_of_slot >= len(rows)).view_as(weights), 0)
        rows = rows if len(rows) else rows.new_zeros(1, rows.shape[1])
        row_of_slot = row_of_slot.clamp(max=len(rows) - 1)
    tokens, top_k = weights.shape
    wide = working_dtype(rows)
    y = torch.empty(tokens, rows.shape[1], dtype=rows.dtype, device=rows.device)
    size = max(1, BLOCK // max(1, top_k * rows.shape[1])) if rows.is_cpu else max(1, tokens)
    for out, index, weight in zip(
        y.split(size), row_of_slot.view(tokens, top_k).split(size), weights.to(wide).split(size), strict=True
    ):
        some = rows.index_select(0, index.flatten()).to(wide).view(*index.shape, rows.shape[1])  # [t, K, H]
        out.copy_(torch.bmm(weight[:, None], some)[:, 0])
    return y


def grouped_matmul(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N, A] by expert, weight [E, A, B] (any view), ends [E] -> rows x matrices [N, B]."""
    out = torch.empty(len(rows), weight.shape[2], dtype=rows.dtype, device=rows.device)
    for start, end, matrix in _groups(ends, weight):
        torch.mm(rows[start:end], matrix, out=out[start:end])
    return out


def grouped_weight_grad(rows: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """rows [N, A], grad [N, B] by expert, ends [E] -> rows^T grad [E, A, B], zeros without rows."""
    out = torch.empty(len(ends), rows.shape[1], grad.shape[1], dtype=rows.dtype, device=rows.device)
    for start, end, matrix in _groups(ends, out):
        torch.mm(rows[start:end].T, grad[start:end], out=matrix)
    return out


def _groups(ends: Tensor, matrices: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """-> start, end and matrix of each expert. On a CPU F.grouped_mm loops as well, and copies."""
    bounds = [0, *ends.tolist()]
    return zip(bounds[:-1], bounds[1:], matrices, strict=True)


# -- elementwise, norms, rotary --------------------------------------------------------------------


def swiglu(x: Tensor) -> Tensor:
    """x [..., 2I], gate first -> [..., I], fp32 inside."""
    wide, out = working_dtype(x), x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    for part, y in row_blocks(_rows(x), _rows(out)):
        gate, up = part.chunk(2, dim=-1)
        y.copy_(F.silu(gate.to(wide)).mul_(up))
    return out


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """grad [..., I], x [..., 2I] -> [..., 2I], fp32 inside."""
    wide, out = working_dtype(x), x.new_empty(x.shape)
    for part, g, y in row_blocks(_rows(x), _rows(grad), _rows(out)):
        (gate, up), (grad_gate, grad_up) = part.to(wide).chunk(2, dim=-1), y.chunk(2, dim=-1)
        g = g.to(wide)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        grad_up.copy_(silu * g)
        # silu' = sigmoid (1 + gate - silu)
        grad_gate.copy_((gate - silu).add_(1).mul_(sigmoid).mul_(up).mul_(g))
    return out


def zero_centred_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., D], weight [D] -> x_hat * (1 + weight) in x's dtype; rstd [N, 1], 1 / rms by row."""
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), 1, dtype=working_dtype(x))
    factor = 1 + weight.to(rstd.dtype)
    for part, r, out in row_blocks(_rows(x), rstd, _rows(y)):
        out.copy_(_normed(part.to(r.dtype), r, eps).mul_(factor))
    return y, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, factor: Tensor, rstd: Tensor, need: bool) -> tuple[Tensor, Tensor]:
    """factor [D]: that of x_hat, in rstd's dtype -> grad_x, the factor's gradient, or 0"""
    grad_x, grad_factor = x.new_empty(x.shape), torch.zeros_like(factor)
    for part, g, r, out in row_blocks(_rows(x), _rows(grad), rstd, _rows(grad_x)):
        x_hat, g = part.to(r.dtype) * r, g.to(r.dtype)
        grad_factor += (g * x_hat).sum(0) if need else 0
        out.copy_(_norm_backward(x_hat, g * factor, r))
    return grad_x, grad_factor


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, gate [..., D], weight [D] -> weight * x_hat * silu(gate) in x's dtype, rstd [N, 1]"""
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), 1, dtype=working_dtype(x))
    factor = weight.to(rstd.dtype)
    for part, z, r, out in row_blocks(_rows(x), _rows(gate), rstd, _rows(y)):
        out.copy_(_normed(part.to(r.dtype), r, eps).mul_(factor).mul_(F.silu(z.to(r.dtype))))
    return y, rstd


def rms_norm_gated_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, rstd: Tensor, eps: float, need: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> grad_x, grad_gate, grad_weight, or 0"""
    grad_x, grad_gate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    factor = weight.to(rstd.dtype)
    grad_weight = torch.zeros_like(factor)
    for part, z, g, r, out, gate_out in row_blocks(*map(_rows, (x, gate, grad, rstd, grad_x, grad_gate))):
        x_hat, z, g = part.to(r.dtype) * r, z.to(r.dtype), g.to(r.dtype)
        sigmoid = z.sigmoid()
        silu = z * sigmoid
        g_hat = g * x_hat
        grad_weight += (g_hat * silu).sum(0) if need else 0
        # silu' = sigmoid (1 + z - silu)
        gate_out.copy_((z - silu).add_(1).mul_(sigmoid).mul_(g_hat).mul_(factor))
        out.copy_(_norm_backward(x_hat, silu.mul_(g).mul_(factor), r))
    return grad_x, grad_gate, grad_weight


def _rows(x: Tensor) -> Tensor:
    """x [..., D] -> [N, D], a view if x is contiguous."""
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


def _normed(x: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """x [n, D] in working precision -> x / rms(x). Writes 1 / rms(x) into rstd [n, 1]."""
    torch.rsqrt(torch.linalg.vecdot(x, x)[:, None].div_(x.shape[1]).add_(eps), out=rstd)
    return x * rstd


def _norm_backward(x_hat: Tensor, grad: Tensor, rstd: Tensor) -> Tensor:
    """x_hat [n, D], its gradient (overwritten), rstd [n, 1] -> the gradient of x [n, D]."""
    mean = torch.linalg.vecdot(grad, x_hat)[:, None].div_(grad.shape[1])
    return grad.addcmul_(x_hat, mean, value=-1).mul_(rstd)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, Hk, D]; cos, sin [T, R/2] -> both rotated, fp32 inside."""
    return _rotate(q, cos[:, None], sin[:, None]), _rotate(k, cos[:, None], sin[:, None])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half, y = cos.shape[-1], x.new_empty(x.shape)
    for part, c, s, out in row_blocks(x, cos, sin, y):
        a, b = part[..., :half].to(c.dtype), part[..., half : 2 * half].to(c.dtype)
        out[..., :half] = a * c - b * s
        out[..., half : 2 * half] = b * c + a * s
        out[..., 2 * half :] = part[..., 2 * half :]
    return y


# -- the output head -------------------------------------------------------------------------------

SOFTMAX_ROWS = 16  # rows of one softmax on a CPU: 16 MB in fp32 for a vocabulary of 250,000
VOCABULARY_SLICE = 4096  # of the head's matrix at once in its gradients
LOGIT_BLOCKS = 1  # a chunk's logits have so many times CHUNK_LOGITS elements


def rows_with_label(labels: Tensor) -> Tensor:
    """labels [T] -> the indices of those that are not -100. Off the CPU it waits for the device."""
    return (labels != -100).nonzero().squeeze(1)


def cross_entropy(logits: Tensor, target: Tensor, scale: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """logits [c, V], target, scale [c] -> losses [c], gradient of the logits [c, V].

    The gradient, scale * (softmax - 1 at the target), overwrites the logits, a few rows at a time
    in fp32.
    """
    wide = working_dtype(logits)
    size = SOFTMAX_ROWS if logits.is_cpu else len(logits)
    buffers = [torch.empty(min(size, len(logits)), logits.shape[1], dtype=wide, device=logits.device) for _ in range(2)]
    losses = []
    for part, its_target, its_scale in zip(
        logits.split(size), target[:, None].split(size), scale[:, None].split(size), strict=True
    ):
        x, p = (buffer[: len(part)] for buffer in buffers)
        torch.softmax(x.copy_(part), -1, out=p)
        log_sum = x.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
        losses.append(log_sum - x.gather(1, its_target))
        if need_grad:
            p.scatter_add_(1, its_target, torch.full_like(its_scale, -1))
            part.copy_(p.mul_(its_scale))
    return torch.cat(losses).squeeze(1), logits if need_grad else None


def head_hidden_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [c, V], weight [V, D] -> [c, D]. On a CPU one matmul would take 1.2 times as long."""
    if not grad.is_cpu:
        return grad @ weight
    total = grad.new_zeros(len(grad), weight.shape[1], dtype=working_dtype(grad))
    for columns, part in zip(grad.split(VOCABULARY_SLICE, dim=1), weight.split(VOCABULARY_SLICE), strict=True):
        total.add_(columns @ part)
    return total.to(grad.dtype)


def head_weight_grad(total: Tensor, grad: Tensor, hidden: Tensor, add: bool) -> None:
    """Writes grad^T hidden into total [V, D], or adds it; grad [c, V], hidden [c, D].

    One slice of the vocabulary at a time, so that no second [V, D] is needed.
    """
    for columns, part in zip(grad.split(VOCABULARY_SLICE, dim=1), total.split(VOCABULARY_SLICE), strict=True):
        for block, product in row_blocks(part, columns.T @ hidden):
            if add:
                block.add_(product)
            else:
                block.copy_(product)


# -- attention -------------------------------------------------------------------------------------

SEQUENCES = 1 << 31  # per call of attention: no limit


def attention(q: Tensor, k: Tensor, v: Tensor, ends: list[int], causal: bool, scale: float) -> tuple[Tensor, ...]:
    """q [T, Hq, D]; k, v [T, Hkv, D]; ends: of sequences -> o [T, Hq, D], tensors for backward.

    Neighbours of equal length run as one batch (video frames, images of one size), without copies.
    """
    outs, sums = [], []
    for qs, ks, vs in _runs(ends, q, k, v):
        if q.is_cpu and HAS_GROUPED_FLASH:
            out, log_sum = flash(qs, ks, vs, 0.0, causal, scale=scale)
            sums.append(log_sum.transpose(1, 2).flatten(0, 1))  # [tokens, Hq]
        else:
            out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=causal, scale=scale, enable_gqa=True)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (outs, sums) if parts)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: tuple[Tensor, ...], ends: list[int], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """saved: all that attention returned -> grad_q, grad_k, grad_v.

    Without a fused backward operator the forward runs again under autograd.
    """
    found: list[list[Tensor]] = [[], [], []]
    for gs, qs, ks, vs, *statistics in _runs(ends, grad, q, k, v, *saved):
        if q.is_cpu and HAS_GROUPED_FLASH:
            out, log_sum = statistics
            grads = flash_backward(gs, qs, ks, vs, out, log_sum, 0.0, causal, scale=scale)
        else:
            inputs = [x.detach().requires_grad_() for x in (qs, ks, vs)]
            qs, ks, vs = inputs
            with torch.enable_grad():
                out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=causal, scale=scale, enable_gqa=True)
            grads = torch.autograd.grad(out, inputs, gs)
        for its, x in zip(found, grads, strict=True):
            its.append(x.transpose(1, 2).flatten(0, 1))
    grad_q, grad_k, grad_v = (its[0] if len(its) == 1 else torch.cat(its) for its in found)
    return grad_q, grad_k, grad_v


def _runs(ends: list[int], *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each run of n neighbours of equal length: views [n, H, length, …] of [T, H, …]."""
    runs = [(length, len(list(same))) for length, same in groupby(b - a for a, b in pairwise([0, *ends]))]
    parts = (x.split([length * count for length, count in runs]) for x in tensors)
    for (_, count), *some in zip(runs, *parts, strict=True):
        yield tuple(rearrange(x, "(n t) h ... -> n h t ...", n=count) for x in some)
