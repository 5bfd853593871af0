"""The routed experts of moe.py under expert parallelism: each of ep ranks owns E/ep of them.

Tokens are sent, weights are not. Of a rank's T*K rows (ep-1)/ep belong to other ranks' experts. Of
two algorithms the one that sends less is used:
- All-to-all sends K*T*H*(ep-1)/ep elements each way: every row goes to its expert's rank and back.
  (To send a token once to a rank that has several of its experts would save up to a third.)
- All-gather sends (ep-1)*T*H each way, less if ep < K, and as much if ep = K, but reorders rows
  less often: every rank receives all tokens and computes its experts' share of each; the token's
  rank sums its ep shares. They are sent in x's dtype and summed in fp32, which no collective does.

Both begin with a small exchange of row counts and the layer's only host sync, because a rank must
know how much it will receive. With a recompute cache, the second run of a layer needs neither, and
it stops at gate_up's output where the layer ends with its experts. Backward sends the gradients in
the same way, plus one number per row: all-to-all sends the routing weights to the experts, and both
send their gradients back. Received rows are saved for backward, not sent again. The projections'
gradients are computed while the gradient of x is being sent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels import native
from kernels.features import all_gather_single
from kernels.moe import hidden_backward, moe_experts
from kernels.moe_lora import ExpertAdapters, projections, stacks
from kernels.native import working_dtype
from kernels.recompute_cache import RecomputeCache, skips_experts_output

CountReader = Callable[[Tensor, int, int], list[list[list[int]]]]


def read_counts(counts: Tensor, tokens: int, top_k: int) -> list[list[list[int]]]:
    """counts [2, ep, E/ep + 1] (sent, received) -> the same as lists. Waits for the device."""
    return counts.tolist()


def moe_experts_parallel(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    group: dist.ProcessGroup,
    recompute_cache: RecomputeCache | None = None,
    primitives: ModuleType = native,
    count_reader: CountReader = read_counts,
    exchange: "type[Exchange] | None" = None,
    adapters: ExpertAdapters | None = None,
) -> Tensor:
    """Inputs are this rank's tokens: x [T, H], topk_ids [T, K] int below E, topk_weights [T, K].

    gate_up_proj [E/ep, 2I, H], down_proj [E/ep, H, I]: the E/ep experts from rank*E/ep. T may
    differ between ranks. Returns [T, H] in x's dtype; the sum over K runs in fp32. The projections'
    gradients include the tokens of all ranks: they are already summed over the group.

    A collective: every rank of `group` must call it, and its backward, in the same order and with
    the same inputs frozen.

    primitives, adapters: as for moe_experts; adapters of the same E/ep experts. count_reader: reads
    the counts on the host; fake tensors need another one. exchange: the class that sends the rows.
    To give one forces all-to-all; the default is Exchange, used where all-to-all sends less.
    """
    ep = dist.get_world_size(group)
    if exchange is not None:
        exchange.check(x, topk_ids.shape[1], ep, len(gate_up_proj), adapters is not None)
    if ep == 1:
        return moe_experts(x, topk_ids, topk_weights, gate_up_proj, down_proj, primitives, adapters, recompute_cache)
    algorithm = _AllGatherExperts if exchange is None and ep <= topk_ids.shape[1] else _AllToAllExperts
    scale = adapters.scale if adapters else 1.0
    options = Options(group, recompute_cache, primitives, count_reader, exchange or Exchange, scale)
    return algorithm.apply(options, x, topk_ids, topk_weights, *stacks(gate_up_proj, down_proj, adapters))


@dataclass(frozen=True)
class Routes:
    """How many rows go where. The lists are on the host, in the order of the group's ranks."""

    sent: list[list[int]]  # [ep][E/ep] rows of this rank's tokens for each expert
    received: list[list[int]]  # [ep][E/ep] rows of each rank's tokens for this rank's experts
    tokens: list[int]  # [ep] tokens of each rank
    counts: Tensor  # `received` on the device, [ep, E/ep] int64


@dataclass(frozen=True)
class Options:
    """The arguments of moe_experts_parallel that are not tensors."""

    group: dist.ProcessGroup
    recompute_cache: RecomputeCache | None
    ops: ModuleType
    count_reader: CountReader
    exchange_class: "type[Exchange]"
    scale: float  # of the adapters


def exchange_counts(count_choices: Callable[[], Tensor], ids: Tensor, options: Options) -> Routes:
    """Exchange the row counts: one small collective and the layer's only host sync.

    count_choices() -> [E], how often this rank's tokens chose each expert.
    """

    def make() -> Routes:
        ep, (tokens, top_k) = dist.get_world_size(options.group), ids.shape
        sent = F.pad(count_choices().view(ep, -1), (0, 1), value=tokens)  # [ep, E/ep + 1]
        both = torch.stack([sent, torch.empty_like(sent)])
        dist.all_to_all_single(both[1], both[0], group=options.group)
        to_send, to_receive = options.count_reader(both, tokens, top_k)
        return Routes(
            [counts[:-1] for counts in to_send],
            [counts[:-1] for counts in to_receive],
            [counts[-1] for counts in to_receive],
            both[1, :, :-1].contiguous(),
        )

    return make() if options.recompute_cache is None else options.recompute_cache.once(make)


def regroup_indices(counts: Tensor, total: int) -> Tensor:
    """Indices between a-major and b-major order of rows; counts [A, B]: the rows of each (a, b).

    Returns [2, total] int32: the first regroups rows from a-major to b-major, the second back. An
    index increases by one inside a part (a, b) and jumps between parts. (repeat_interleave is
    shorter, but on some releases of torch_npu it waits for the device.)
    """
    # [2, A*B], both in the target order
    lengths = torch.stack([counts.T.flatten(), counts.flatten()]).to(torch.int32)
    ends = lengths.cumsum(1, dtype=torch.int32)
    source_ends = torch.stack([ends[1].view_as(counts).T.flatten(), ends[0].view_as(counts.T).T.flatten()])
    jumps = source_ends - lengths - F.pad(source_ends[:, :-1], (1, 0), value=1)
    # total + 1, because an empty part may start at the very end
    steps = torch.ones(2, total + 1, dtype=torch.int32, device=counts.device)
    steps.scatter_add_(1, (ends - lengths).long(), jumps)
    return steps[:, :total].cumsum(1, dtype=torch.int32)


@dataclass(frozen=True)
class PendingRows:
    """A transfer under way. It keeps `sent` alive; `order` regroups the received rows."""

    sent: Tensor
    received: Tensor
    work: dist.Work
    order: Tensor | None = None

    def wait(self) -> Tensor:
        self.work.wait()
        return self.received if self.order is None else self.received.index_select(0, self.order)


class Exchange:
    """Dispatches rows to their experts' ranks and combines them back.

    On the tokens' rank, rows are sorted by expert, and therefore by rank. On the experts' rank they
    arrive sorted by source rank and are regrouped by expert.
    """

    def __init__(
        self, routes: Routes, group: dist.ProcessGroup, primitives: ModuleType, indices: Tensor | None = None
    ) -> None:
        """indices: those of an earlier exchange over the same routes, to be reused."""
        self.routes, self.group, self.ops, self.indices = routes, group, primitives, indices
        self.send_counts, self.receive_counts = (
            [sum(counts) for counts in side] for side in (routes.sent, routes.received)
        )
        # int32, because NPUs run an int64 cumsum on their AI CPU
        ep, counts = len(routes.counts), routes.counts.T.flatten().to(torch.int32)
        # [E/ep], where each local expert's rows end
        self.ends = counts.cumsum(0, dtype=torch.int32)[ep - 1 :: ep].long()

    @staticmethod
    def check(x: Tensor, top_k: int, ranks: int, local: int, adapted: bool) -> None:
        """Raises if this class does not take x of top_k experts a token, `local` a rank."""

    def regroup_indices(self) -> Tensor:
        """[2, N]: from rank-major to expert-major order, and back."""
        if self.indices is None:
            self.indices = regroup_indices(self.routes.counts, sum(self.receive_counts))
        return self.indices

    def dispatch(self, rows: Tensor) -> PendingRows:
        """rows [T*K, …] -> [N, …] by local expert, where N is what this rank's experts receive"""
        return self._send(rows, self.send_counts, self.receive_counts, self.regroup_indices()[0])

    def combine(self, rows: Tensor) -> PendingRows:
        """rows [N, …] -> [T*K, …], as they were dispatched"""
        rows = rows.index_select(0, self.regroup_indices()[1])  # also frees the given rows if nobody else holds them
        return self._send(rows, self.receive_counts, self.send_counts)

    def _send(
        self, rows: Tensor, send_counts: list[int], receive_counts: list[int], order: Tensor | None = None
    ) -> PendingRows:
        received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
        work = dist.all_to_all_single(received, rows, receive_counts, send_counts, group=self.group, async_op=True)
        return PendingRows(rows, received, work, order)

    def dispatch_and_matmul(self, rows: Tensor, weight: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        """rows [T*K, A] -> the dispatched rows [N, A] and their products [N, B] with `weight`.

        weight is [E/ep, A, B], or [E/ep, B, A] if `transposed`.
        """
        arrived = self.dispatch(rows).wait()
        return arrived, self.ops.grouped_matmul(arrived, weight.mT if transposed else weight, self.ends)

    def matmul_and_combine(
        self, rows: Tensor, weight: Tensor, transposed: bool, add: Callable[[Tensor], Tensor]
    ) -> Callable[[], Tensor]:
        """rows [N, A], weight as above; add: an adapter's -> a function that waits for [T*K, B]."""
        return self.combine(add(self.ops.grouped_matmul(rows, weight.mT if transposed else weight, self.ends))).wait


class _AllToAllExperts(torch.autograd.Function):
    """moe_experts_parallel by all-to-all."""

    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, ids: Tensor, weights: Tensor, *stacks: Tensor) -> Tensor:
        ops = options.ops
        rows, row_of_slot, ends = ops.permute(x, ids, dist.get_world_size(options.group) * len(stacks[0]))
        routes = exchange_counts(lambda: ends.diff(prepend=ends.new_zeros(1)), ids, options)
        exchange = options.exchange_class(routes, options.group, ops)
        gate_up_proj, down_proj = projections(ops, exchange.ends, options.scale, stacks)
        rows, gate_up = exchange.dispatch_and_matmul(rows, gate_up_proj.weight, True)  # [N, H], [N, 2I]
        gate_up_proj.add(gate_up, rows)
        rows = rows if any(ctx.needs_input_grad[4:7]) else None
        ctx.save_for_backward(ids, weights, rows, gate_up, row_of_slot, exchange.indices, *stacks)
        del rows
        ctx.routes, ctx.options = routes, options
        if skips_experts_output(options.recompute_cache):
            return torch.empty_like(x)
        hidden = ops.swiglu(gate_up)
        out = exchange.matmul_and_combine(hidden, down_proj.weight, True, partial(down_proj.add, rows=hidden))()
        del hidden
        return ops.unpermute(out, row_of_slot, weights)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        ids, weights, rows, gate_up, row_of_slot, indices, *stacks = ctx.saved_tensors
        need_x, _, need_weights, *for_stacks = ctx.needs_input_grad[1:]
        ops = ctx.options.ops
        exchange = ctx.options.exchange_class(ctx.routes, ctx.options.group, ops, indices)
        gate_up_proj, down_proj = projections(ops, exchange.ends, ctx.options.scale, stacks)
        weight = exchange.dispatch(ops.weight_of_row(weights, row_of_slot))
        # [N, H] and [N, I], both before the multiplication by the row's routing weight
        grad_out, grad_hidden = exchange.dispatch_and_matmul(
            ops.sorted_rows(grad_y, ids, row_of_slot), down_proj.weight, False
        )
        low = down_proj.low(grad_out)
        down_proj.add_backward(grad_hidden, low)
        dots, hidden, grad_gate_up = hidden_backward(ops, grad_hidden, gate_up, weight.wait())
        del grad_hidden
        low_of_gate_up = gate_up_proj.low(grad_gate_up)
        add = partial(gate_up_proj.add_backward, low=low_of_gate_up)
        wait_for_rows = exchange.matmul_and_combine(grad_gate_up, gate_up_proj.weight, False, add) if need_x else None
        pending_dots = exchange.combine(dots) if need_weights else None
        of_down = down_proj.gradients(for_stacks[3:], hidden, grad_out, low)
        of_gate_up = gate_up_proj.gradients(for_stacks[:3], rows, grad_gate_up, low_of_gate_up)
        grad_x = ops.permute_backward(wait_for_rows(), row_of_slot, ids.shape[1]) if wait_for_rows else None
        grad_weights = pending_dots.wait().index_select(0, row_of_slot).view_as(weights) if pending_dots else None
        return None, grad_x, None, grad_weights, *of_gate_up, *of_down


class _AllGatherExperts(torch.autograd.Function):
    """moe_experts_parallel by all-gather: only the slots of this rank's own experts get rows."""

    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, ids: Tensor, weights: Tensor, *stacks: Tensor) -> Tensor:
        ops, group = options.ops, options.group
        ep, local = dist.get_world_size(group), len(stacks[0])
        routes = exchange_counts(lambda: ops.histogram(ids, ep * local), ids, options)
        max_tokens, total, wide = max(routes.tokens), sum(map(sum, routes.received)), working_dtype(weights)
        # ids and weights are gathered together; fp32 represents expert ids (far below 2^24) exactly
        choice = torch.cat([ids.to(wide), weights.to(wide)], 1)
        pending_choices = _all_gather(choice, max_tokens, group, ep * local)
        pending_x = _all_gather(x, max_tokens, group)
        choices = pending_choices.wait().view(-1, 2, ids.shape[1])
        # renumber: this rank's experts become 0 to E/ep - 1, all others and the padding follow
        chosen = choices[:, 0].to(torch.int32)
        all_ids = torch.where(chosen < ep * local, (chosen - local * dist.get_rank(group)) % (ep * local), chosen)
        rows, row_of_slot, ends = ops.permute(pending_x.wait(), all_ids, local, total)
        gate_up_proj, down_proj = projections(ops, ends, options.scale, stacks)
        gate_up = gate_up_proj.forward(rows)  # [N, 2I]
        # one recomputed layer at a time keeps its rows; if ep = K they are no more than the tokens
        ctx.has_rows = ep == ids.shape[1] or options.recompute_cache is not None
        saved_x = (rows if ctx.has_rows else pending_x.received) if any(ctx.needs_input_grad[4:7]) else None
        del rows, pending_x
        all_weights = choices[:, 1].to(weights.dtype).contiguous()  # a copy, so that `choices` is freed
        ctx.save_for_backward(all_ids, all_weights, saved_x, gate_up, row_of_slot, ends, *stacks)
        ctx.options, ctx.total, ctx.tokens = options, total, len(x)
        if skips_experts_output(options.recompute_cache):
            return torch.empty_like(x)
        # [ep * max_tokens, H], from the rows' outputs [N, H]
        shares = ops.unpermute(down_proj.forward(ops.swiglu(gate_up)), row_of_slot, all_weights)
        y = _sum_shares(ops, _all_to_all(shares, group).wait(), ep)
        return y if len(y) == len(x) else y[: len(x)].clone()  # FSDP2 warns if a unit returns a view

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        ids, weights, x, gate_up, row_of_slot, ends, *stacks = ctx.saved_tensors
        need_x, _, need_weights, *for_stacks = ctx.needs_input_grad[1:]
        ops, group, total, ep = ctx.options.ops, ctx.options.group, ctx.total, dist.get_world_size(ctx.options.group)
        gate_up_proj, down_proj = projections(ops, ends, ctx.options.scale, stacks)
        grad_out = ops.sorted_rows(_all_gather(grad_y, len(ids) // ep, group).wait(), ids, row_of_slot, count=total)
        weight = ops.weight_of_row(weights, row_of_slot)[:total]
        low = down_proj.low(grad_out)
        grad_hidden = down_proj.backward(grad_out, low)
        dots, hidden, grad_gate_up = hidden_backward(ops, grad_hidden, gate_up, weight)
        del grad_hidden
        low_of_gate_up = gate_up_proj.low(grad_gate_up)
        pending_grad_x = pending_slots = None
        if need_x:
            ones = torch.ones_like(weights)
            shares = ops.unpermute(gate_up_proj.backward(grad_gate_up, low_of_gate_up), row_of_slot, ones)
            pending_grad_x = _all_to_all(shares, group)
        if need_weights:  # each slot has its row on one rank; the other ranks send zeros
            slot_grads = F.pad(dots, (0, 1)).index_select(0, row_of_slot.clamp(max=total)).view_as(weights)
            pending_slots = _all_to_all(slot_grads, group)
        of_down = down_proj.gradients(for_stacks[3:], hidden, grad_out, low)
        rows = x if x is None or ctx.has_rows else ops.sorted_rows(x, ids, row_of_slot, grad_out, total)
        of_gate_up = gate_up_proj.gradients(for_stacks[:3], rows, grad_gate_up, low_of_gate_up)
        grad_x = _sum_shares(ops, pending_grad_x.wait(), ep)[: ctx.tokens] if pending_grad_x else None
        grad_weights = pending_slots.wait().unflatten(0, (ep, -1)).sum(0)[: ctx.tokens] if pending_slots else None
        return None, grad_x, None, grad_weights, *of_gate_up, *of_down


def _all_gather(x: Tensor, max_tokens: int, group: dist.ProcessGroup, padding: float = 0) -> PendingRows:
    """x [T, A] of each rank -> [ep * max_tokens, A]; ranks with fewer tokens are padded"""
    if len(x) < max_tokens:
        x = F.pad(x, (0, 0, 0, max_tokens - len(x)), value=padding)
    x = x.contiguous()
    received = x.new_empty(dist.get_world_size(group) * max_tokens, *x.shape[1:])
    return PendingRows(x, received, all_gather_single(received, x, group=group, async_op=True))


def _all_to_all(shares: Tensor, group: dist.ProcessGroup) -> PendingRows:
    """This rank's shares of all tokens -> all ranks' shares of its tokens; [ep * max_tokens, A]"""
    received = torch.empty_like(shares)
    return PendingRows(shares, received, dist.all_to_all_single(received, shares, group=group, async_op=True))


def _sum_shares(ops: ModuleType, shares: Tensor, ep: int) -> Tensor:
    """shares [ep * max_tokens, H] by rank -> [max_tokens, H], summed like the K rows of a token"""
    row_of_slot = torch.arange(len(shares), device=shares.device, dtype=torch.int32).view(ep, -1).T
    return ops.permute_backward(shares, row_of_slot.flatten(), ep)
