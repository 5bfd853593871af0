"""Which rank holds which expert, by the experts' loads; rows of their tensors move accordingly.

The router, checkpoints and exports keep the experts' own order. Slots say where each expert is: in
row slot % (E / ranks) of rank slot // (E / ranks), among the ranks of expert parallelism.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def busiest(load: np.ndarray, slots: Sequence[int], ranks: int) -> float:
    """load [E], tokens of each expert -> those of the busiest rank over the mean of all ranks."""
    of_rank = load[np.argsort(slots)].reshape(ranks, -1).sum(1)
    return float(of_rank.max() / max(of_rank.mean(), 1))


def rebalance(load: np.ndarray, slots: Sequence[int], ranks: int, goal: float) -> list[int]:
    """Slots with which no rank has more than `goal` times the mean load, or as close as swaps come.

    Experts of the busiest rank are swapped with others one by one, so that few move. load [E] holds
    whole numbers, with which all ranks find the same.
    """
    size, in_slot = len(load) // ranks, np.argsort(slots)  # the expert in each slot
    for _ in range(len(load)):
        of_slot = load[in_slot].reshape(ranks, size)
        of_rank = of_slot.sum(1)
        top = int(of_rank.argmax())
        if of_rank[top] * ranks <= goal * of_rank.sum():
            break
        # [size, ranks, size]: what a swap takes off the busiest rank's load, and half of what it
        # takes off the sum of squares of all ranks' loads
        moved = of_slot[top][:, None, None] - of_slot[None]
        gain = moved * (of_rank[top] - of_rank[None, :, None] - moved)
        own, rank, other = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[own, rank, other] <= 0:
            break
        a, b = top * size + own, rank * size + other
        in_slot[[a, b]] = in_slot[[b, a]]
    return np.argsort(in_slot).tolist()


def most_sent(old: Sequence[int], new: Sequence[int], ranks: int) -> int:
    """Of how many experts the rank that sends most sends the rows to others."""
    size = len(old) // ranks
    sent = [a // size for a, b in zip(old, new, strict=True) if a // size != b // size]
    return max(map(sent.count, sent), default=0)


@torch.no_grad()
def move_rows(
    tensor: Tensor, old: Sequence[int], new: Sequence[int], group: dist.ProcessGroup, device: torch.device
) -> None:
    """tensor [E/ranks, …], this rank's part, from the slots `old` to `new`, in place. A collective.

    device: that of the transfer; the tensor may be in host memory.
    """
    ranks, rank, size = dist.get_world_size(group), dist.get_rank(group), len(tensor)
    moving = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    # both sides order the rows between two ranks by their old slots
    sent = sorted((b // size, a) for a, b in moving if a // size == rank)
    received = sorted((a, b) for a, b in moving if b // size == rank)
    rows = tensor[_index([a % size for _, a in sent], tensor)].to(device)
    arrived = rows.new_empty(len(received), *tensor.shape[1:])
    to, source = [to for to, _ in sent], [a // size for a, _ in received]
    receive_counts, send_counts = ([places.count(r) for r in range(ranks)] for places in (source, to))
    dist.all_to_all_single(arrived, rows, receive_counts, send_counts, group=group)
    tensor[_index([b % size for _, b in received], tensor)] = arrived.to(tensor.device)


def _index(rows: list[int], tensor: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=tensor.device)
