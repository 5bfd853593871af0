"""The routed experts of moe.py where each of ep ranks owns E/ep of them: tokens travel, weights stay.

Two ways, chosen by what they send. A rank's T tokens have K rows each, of which (ep-1)/ep belong elsewhere:
- all-to-all, K*T*H*(ep-1)/ep each way: every row goes to its expert's rank and back. (The least would be a token once to each
  rank that has several of its experts, and one sum back: two thirds of that at ep = K = 8, evenly chosen. Not done.);
- all-gather, (ep-1)*T*H each way, less where ep < K: every rank sees all tokens, sums its own experts' share of each, and the
  ep shares of a token are summed on the token's rank. The shares travel in x's dtype and are summed in fp32, which is why
  this is an all-to-all of equal parts and an addition, not a reduce-scatter in bf16: that sends as much and rounds each sum.

Before that, one small exchange of counts, and the one host sync of the layer: the ranks must know how much to expect. Both
are spared where a layer is run again for backward (kernels/recompute_cache.py). Backward sends gradients the same two ways, and for each
row a number: all-to-all its weight out, both ways the weight's gradient back. The rows that the experts saw are kept, not
sent again; while the gradient of x is on its way back, those of the projections are computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels import native
from kernels.features import all_gather_single
from kernels.moe import hidden_backward, moe_experts
from kernels.native import working_dtype
from kernels.recompute_cache import RecomputeCache

Sizes = Callable[[Tensor, int, int], list[list[list[int]]]]


def read(counts: Tensor, tokens: int, top_k: int) -> list[list[list[int]]]:
    """The counts [2, ep, E/ep + 1], sent and received, on the host: waits for the device."""
    return counts.tolist()


def balanced(counts: Tensor, tokens: int, top_k: int, imbalance: float = 1.0) -> list[list[list[int]]]:
    """In the place of `read`, where the counts cannot be read (fake tensors): each expert is chosen equally often.

    With `imbalance`, this rank's experts by that factor more often.
    """
    _, ep, experts = counts.shape
    experts -= 1
    rows, total = tokens * top_k, ep * experts
    bounds = [rows * i // total for i in range(total + 1)]
    sent = [[bounds[i + 1] - bounds[i] for i in range(r * experts, (r + 1) * experts)] for r in range(ep)]
    received = [[round(count * imbalance) for count in counts] for counts in sent]
    return [[[*counts, tokens] for counts in both] for both in (sent, received)]


def moe_experts_parallel(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    group: dist.ProcessGroup,
    recompute_cache: RecomputeCache | None = None,
    primitives: ModuleType = native,
    sizes: Sizes = read,
    exchange: "type[Exchange] | None" = None,
) -> Tensor:
    """x [T, H], topk_ids [T, K] int over all E experts, topk_weights [T, K]: of this rank's tokens, T may differ by rank.

    gate_up_proj [E/ep, 2I, H], down_proj [E/ep, H, I]: of experts rank*E/ep and on. Returns [T, H] in x's dtype; the sum over
    K runs in fp32. The gradients of the projections are those of all ranks' tokens: already summed over the group.

    A collective: every rank of `group` calls it, and its backward, in the same order, with the same inputs frozen. `recompute_cache`: of
    a layer that is run again. `primitives`: as for moe_experts. `sizes`: what reads the counts on the host; a rehearsal on
    fake tensors, where there is nothing to read, gives `balanced` (or a partial of it). `exchange`: what to exchange with, all
    to all whatever ep is; if not given, the plain one, where that sends less.
    """
    ep = dist.get_world_size(group)
    if ep == 1:
        return moe_experts(x, topk_ids, topk_weights, gate_up_proj, down_proj, primitives)
    way = _Gathered if exchange is None and ep < topk_ids.shape[1] else _Exchanged
    how = How(group, recompute_cache, primitives, sizes, exchange or Exchange)
    return way.apply(x, topk_ids, topk_weights, gate_up_proj, down_proj, how)


@dataclass(frozen=True)
class Routes:
    """How many rows go where; lists are on the host, in the order of the group's ranks."""

    sent: list[list[int]]  # [ep][E/ep]: rows of this rank's tokens, by their expert
    received: list[list[int]]  # [ep][E/ep]: rows of each rank's tokens that are for this rank's experts
    tokens: list[int]  # [ep]: of each rank
    counts: Tensor  # `received` on the device, [ep, E/ep] int64


@dataclass(frozen=True)
class How:
    """What both ways take beside tensors, as moe_experts_parallel was given it."""

    group: dist.ProcessGroup
    recompute_cache: RecomputeCache | None
    do: ModuleType
    sizes: Sizes
    kind: "type[Exchange]"


def ask(chosen: Callable[[], Tensor], ids: Tensor, how: How) -> Routes:
    """The one exchange of counts and the one host sync of a layer. chosen() -> [E], how often this rank chose each expert."""

    def make() -> Routes:
        ep = dist.get_world_size(how.group)
        tokens, top_k = ids.shape
        sent = F.pad(chosen().view(ep, -1), (0, 1), value=tokens)  # [ep, E/ep + 1]
        both = torch.stack([sent, torch.empty_like(sent)])
        dist.all_to_all_single(both[1], both[0], group=how.group)
        to, came = how.sizes(both, tokens, top_k)
        return Routes(
            [counts[:-1] for counts in to],
            [counts[:-1] for counts in came],
            [counts[-1] for counts in came],
            both[1, :, :-1].contiguous(),
        )

    return make() if how.recompute_cache is None else how.recompute_cache.once(make)


def orders(counts: Tensor, total: int) -> Tensor:
    """counts [A, B] of parts that lie by a, inside by b, or by b, inside by a -> the indices that turn one into the other.

    [2, total] int32: the first lays out by b what lies by a, the second back. An index counts up by one inside a part, and
    jumps from one to the next. (repeat_interleave would say it in a line; on some releases of torch_npu it may wait.)
    """
    lengths = torch.stack([counts.T.flatten(), counts.flatten()]).to(
        torch.int32
    )  # [2, A*B], in the order of what is to be
    ends = lengths.cumsum(1, dtype=torch.int32)
    now = torch.stack(
        [ends[1].view_as(counts).T.flatten(), ends[0].view_as(counts.T).T.flatten()]
    )  # where each ends as yet
    jumps = now - lengths - F.pad(now[:, :-1], (1, 0), value=1)
    steps = torch.ones(2, total + 1, dtype=torch.int32, device=counts.device)  # an empty part may start at the very end
    steps.scatter_add_(1, (ends - lengths).long(), jumps)
    return steps[:, :total].cumsum(1, dtype=torch.int32)


@dataclass(frozen=True)
class Coming:
    """What is on its way: `sent` must live until it has arrived; then it is laid out in `order`, if there is one."""

    sent: Tensor
    received: Tensor
    work: dist.Work
    order: Tensor | None = None

    def wait(self) -> Tensor:
        self.work.wait()
        return self.received if self.order is None else self.received.index_select(0, self.order)


class Exchange:
    """Rows to their experts' ranks and back. At home they lie by expert, so by rank; there by expert of that rank."""

    def __init__(
        self, routes: Routes, group: dist.ProcessGroup, primitives: ModuleType, known: Tensor | None = None
    ) -> None:
        """known: the orders, if they have been made before."""
        self.routes, self.group, self.do, self.known = routes, group, primitives, known
        self.to_ranks, self.from_ranks = ([sum(counts) for counts in side] for side in (routes.sent, routes.received))
        ep, counts = (
            len(routes.counts),
            routes.counts.T.flatten().to(torch.int32),
        )  # NPUs sum up int64 on their host CPU
        self.ends = counts.cumsum(0, dtype=torch.int32)[ep - 1 :: ep].long()  # [E/ep] of the rows here

    def orders(self) -> Tensor:
        """[2, N]: by expert what lies by rank, and back."""
        if self.known is None:
            self.known = orders(self.routes.counts, sum(self.from_ranks))
        return self.known

    def out(self, rows: Tensor) -> Coming:
        """rows [T*K, …] -> [N, …]"""
        return self._send(rows, self.to_ranks, self.from_ranks, self.orders()[0])

    def back(self, rows: Tensor) -> Coming:
        """[N, …] -> [T*K, …], the opposite way"""
        rows = rows.index_select(0, self.orders()[1])  # lets go of what came in, where nobody else holds it
        return self._send(rows, self.from_ranks, self.to_ranks)

    def _send(self, rows: Tensor, to: list[int], come: list[int], order: Tensor | None = None) -> Coming:
        received = rows.new_empty(sum(come), *rows.shape[1:])
        work = dist.all_to_all_single(received, rows, come, to, group=self.group, async_op=True)
        return Coming(rows, received, work, order)

    def out_and_matmul(self, rows: Tensor, weight: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        """rows [T*K, A], weight [E/ep, A, B], or [E/ep, B, A] transposed -> the rows [N, A] that came, their products [N, B]"""
        came = self.out(rows).wait()
        return came, self.do.grouped_matmul(came, weight.mT if transposed else weight, self.ends)

    def matmul_and_back(self, rows: Tensor, weight: Tensor, transposed: bool) -> Callable[[], Tensor]:
        """rows [N, A], weight as above -> what waits for the products [T*K, B] to be home"""
        return self.back(self.do.grouped_matmul(rows, weight.mT if transposed else weight, self.ends)).wait


class _Exchanged(torch.autograd.Function):
    """All-to-all."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, how: How
    ) -> Tensor:
        do = how.do
        rows, place, ends = do.permute(x, ids, dist.get_world_size(how.group) * len(gate_up_proj))
        routes = ask(lambda: ends.diff(prepend=ends.new_zeros(1)), ids, how)
        exchange = how.kind(routes, how.group, do)
        rows, gate_up = exchange.out_and_matmul(rows, gate_up_proj, True)  # [N, H], [N, 2I]
        seen = rows if ctx.needs_input_grad[3] else None
        del rows
        out = exchange.matmul_and_back(do.swiglu(gate_up), down_proj, True)()  # [T*K, H]
        ctx.save_for_backward(ids, weights, gate_up_proj, down_proj, seen, gate_up, place, exchange.known)
        ctx.routes, ctx.how = routes, how
        return do.unpermute(out, place, weights)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        ids, weights, gate_up_proj, down_proj, rows, gate_up, place, known = ctx.saved_tensors
        need_x, _, need_weights, need_gate_up, need_down, _ = ctx.needs_input_grad
        do = ctx.how.do
        exchange = ctx.how.kind(ctx.routes, ctx.how.group, do, known)
        weight = exchange.out(do.weight_of_row(weights, place))
        # not yet times the row's weight: [N, H], [N, I]
        grad_out, grad_hidden = exchange.out_and_matmul(do.sorted_rows(grad_y, ids, place), down_proj, False)
        dots, hidden, grad_gate_up = hidden_backward(do, grad_hidden, gate_up, weight.wait())
        del grad_hidden
        rows_home = exchange.matmul_and_back(grad_gate_up, gate_up_proj, False) if need_x else None
        dots_home = exchange.back(dots) if need_weights else None
        grad_down = do.grouped_weight_grad(grad_out, hidden, exchange.ends) if need_down else None
        grad_gate_up_proj = do.grouped_weight_grad(grad_gate_up, rows, exchange.ends) if need_gate_up else None
        grad_x = do.permute_backward(rows_home(), place, ids.shape[1]) if rows_home else None
        grad_weights = dots_home.wait().index_select(0, place).view_as(weights) if dots_home else None
        return grad_x, None, grad_weights, grad_gate_up_proj, grad_down, None


class _Gathered(torch.autograd.Function):
    """All-gather. Each rank lays out the rows of its own experts from all ranks' tokens; the slots of others get no rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, how: How
    ) -> Tensor:
        do, group = how.do, how.group
        ep, local = dist.get_world_size(group), len(gate_up_proj)
        routes = ask(lambda: do.histogram(ids, ep * local), ids, how)
        most, total = max(routes.tokens), sum(map(sum, routes.received))
        wide = working_dtype(weights)
        choice = torch.cat([ids.to(wide), weights.to(wide)], 1)  # numbers of experts are far below 2^24: exact
        choices_coming, all_x = _gather(choice, most, group, ep * local), _gather(x, most, group)
        choices = choices_coming.wait().view(-1, 2, ids.shape[1])
        # this rank's experts get the numbers 0 to E/ep - 1, others and the padding higher ones
        chosen = choices[:, 0].to(torch.int32)
        all_ids = torch.where(chosen < ep * local, (chosen - local * dist.get_rank(group)) % (ep * local), chosen)
        rows, place, ends = do.permute(all_x.wait(), all_ids, local, total)
        gate_up = do.grouped_matmul(rows, gate_up_proj.mT, ends)  # [N, 2I]
        del rows
        out = do.grouped_matmul(do.swiglu(gate_up), down_proj.mT, ends)  # [N, H]
        all_weights = choices[:, 1].to(weights.dtype).contiguous()  # of its own: the rest is not kept
        shares = do.unpermute(out, place, all_weights)  # [ep * most, H], of each token what is due to the rows here
        seen = all_x.received if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(all_ids, all_weights, gate_up_proj, down_proj, seen, gate_up, place, ends)
        ctx.how, ctx.total, ctx.tokens = how, total, len(x)
        y = _added(do, _scatter(shares, group).wait(), ep)
        return y if len(y) == len(x) else y[: len(x)].clone()  # FSDP2 warns of views that its units return

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        ids, weights, gate_up_proj, down_proj, x, gate_up, place, ends = ctx.saved_tensors
        need_x, _, need_weights, need_gate_up, need_down, _ = ctx.needs_input_grad
        do, group, total, ep = ctx.how.do, ctx.how.group, ctx.total, dist.get_world_size(ctx.how.group)
        grad_y = _gather(grad_y, len(ids) // ep, group).wait()
        grad_out = do.sorted_rows(grad_y, ids, place, count=total)
        weight = do.weight_of_row(weights, place)[:total]
        grad_hidden = do.grouped_matmul(grad_out, down_proj, ends)
        dots, hidden, grad_gate_up = hidden_backward(do, grad_hidden, gate_up, weight)
        del grad_hidden
        x_home = slots_home = None
        if need_x:
            grad_rows = do.grouped_matmul(grad_gate_up, gate_up_proj, ends)
            x_home = _scatter(do.unpermute(grad_rows, place, torch.ones_like(weights)), group)
            del grad_rows
        if need_weights:  # of the ep shares of a slot all but one are zero
            mine = F.pad(dots, (0, 1)).index_select(0, place.clamp(max=total)).view_as(weights)
            slots_home = _scatter(mine, group)
        grad_down = do.grouped_weight_grad(grad_out, hidden, ends) if need_down else None
        rows = do.sorted_rows(x, ids, place, grad_out, total) if need_gate_up else None
        grad_gate_up_proj = do.grouped_weight_grad(grad_gate_up, rows, ends) if need_gate_up else None
        grad_x = _added(do, x_home.wait(), ep)[: ctx.tokens] if x_home else None
        grad_weights = slots_home.wait().unflatten(0, (ep, -1)).sum(0)[: ctx.tokens] if slots_home else None
        return grad_x, None, grad_weights, grad_gate_up_proj, grad_down, None


def _gather(x: Tensor, most: int, group: dist.ProcessGroup, padding: float = 0) -> Coming:
    """x [T, A] of each rank -> [ep * most, A], the shorter ones filled up"""
    if len(x) < most:
        x = F.pad(x, (0, 0, 0, most - len(x)), value=padding)
    x = x.contiguous()
    received = x.new_empty(dist.get_world_size(group) * most, *x.shape[1:])
    return Coming(x, received, all_gather_single(received, x, group=group, async_op=True))


def _scatter(shares: Tensor, group: dist.ProcessGroup) -> Coming:
    """shares [ep * most, A] of each rank's tokens -> [ep * most, A], each rank's share of this one's"""
    received = torch.empty_like(shares)
    return Coming(shares, received, dist.all_to_all_single(received, shares, group=group, async_op=True))


def _added(do: ModuleType, shares: Tensor, ep: int) -> Tensor:
    """shares [ep * most, H] by rank -> [most, H], summed as the K rows of a token are"""
    place = torch.arange(len(shares), device=shares.device, dtype=torch.int32).view(ep, -1).T
    return do.permute_backward(shares, place.flatten(), ep)
