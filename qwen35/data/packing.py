"""Packs samples into sequences of cutoff_len tokens, and gives each rank its own, step by step.

Packing and order depend on lengths, seed and epoch alone. The algorithm calls a sequence a bin.
"""

import math
from collections.abc import Callable, Iterator
from itertools import count, islice

import numpy as np

POOL = 128  # samples from which a bin is filled, if they are shuffled
OPEN_BINS = 64  # the newest bins, which a sample may still join, if they are not


def pack_epoch(lengths: np.ndarray, cutoff_len: int, seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
    """lengths [N] -> bins of sample indices: each sample in one bin, no bin over cutoff_len tokens.

    shuffle: samples enter a pool in random order. Each bin starts with the pool's oldest sample, or
    with its longest if that fills more than half a bin and so is hard to place, and then takes the
    subset of the pool that fills it best. Finally the bins are shuffled. Without shuffle the order
    is kept, and each sample goes into the first open bin that has room.
    Raises ValueError for a sample longer than a bin.
    """
    if len(lengths) and lengths.max() > cutoff_len:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit into a bin of {cutoff_len}")
    if not shuffle:
        return _first_fit(lengths.tolist(), cutoff_len)
    rng = np.random.default_rng([seed, epoch])
    bins = _best_subsets(rng.permutation(len(lengths)).tolist(), lengths.tolist(), cutoff_len)
    return [bins[i] for i in rng.permutation(len(bins))]


def _best_subsets(order: list[int], lengths: list[int], cutoff_len: int) -> list[list[int]]:
    bins = []
    waiting = iter(order)
    pool = list(islice(waiting, POOL))
    while pool:
        sizes = [lengths[sample] for sample in pool]
        longest = max(sizes)
        first = pool.pop(sizes.index(longest) if 2 * longest > cutoff_len else 0)
        chosen = set(_fullest_subset([lengths[sample] for sample in pool], cutoff_len - lengths[first]))
        bins.append([first, *(sample for i, sample in enumerate(pool) if i in chosen)])
        pool = [sample for i, sample in enumerate(pool) if i not in chosen]
        pool += islice(waiting, POOL - len(pool))
    return bins


def _fullest_subset(lengths: list[int], space: int) -> list[int]:
    """Indices of the lengths that fill `space` best; of several such subsets the earliest."""
    space = min(space, sum(lengths))
    mask = (1 << (space + 1)) - 1
    sums = [1]  # dynamic programming: bit s of sums[i] says that a subset of the first i lengths adds up to s
    for length in lengths:
        sums.append(sums[-1] | (sums[-1] << length) & mask)
        if sums[-1] >> space:
            break
    total = sums[-1].bit_length() - 1
    chosen = []
    for i in range(len(sums) - 2, -1, -1):
        if not sums[i] >> total & 1:
            chosen.append(i)
            total -= lengths[i]
    return chosen


def _first_fit(lengths: list[int], cutoff_len: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free: list[int] = []
    for sample, length in enumerate(lengths):
        first = max(0, len(bins) - OPEN_BINS)
        number = next((b for b in range(first, len(bins)) if free[b] >= length), len(bins))
        if number == len(bins):
            bins.append([])
            free.append(cutoff_len)
        bins[number].append(sample)
        free[number] -= length
    return bins


def moved_forward(bins: list[list[int]]) -> tuple[int, int]:
    """How many samples are in an earlier bin than one before them, and by how many bins at most."""
    bin_of = {sample: number for number, samples in enumerate(bins) for sample in samples}
    newest, moved, farthest = 0, 0, 0
    for sample in sorted(bin_of):
        newest = max(newest, bin_of[sample])
        moved += bin_of[sample] < newest
        farthest = max(farthest, newest - bin_of[sample])
    return moved, farthest


class PackedSequences:
    """The packed sequences of all epochs, one epoch after the other, numbered from 0."""

    def __init__(
        self,
        lengths: np.ndarray,
        cutoff_len: int,
        seed: int,
        shuffle: bool = True,
        members: Callable[[int], np.ndarray] | None = None,
    ):
        """members(epoch): the samples of an epoch, some repeated or left out; None: each once."""
        self.lengths, self.cutoff_len, self.seed, self.shuffle = lengths, cutoff_len, seed, shuffle
        self._members = members
        self._last: tuple[int, list[list[int]]] | None = None  # the epoch packed last, as epoch 0 is asked for twice

    def epoch(self, epoch: int) -> list[list[int]]:
        """The packed sequences of an epoch, each a list of samples."""
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, self._pack(epoch)
        return self._last[1]

    def _filled(self, epoch: int, fill: int) -> list[list[int]]:
        packed = self.epoch(epoch)
        return packed + [[]] * (-len(packed) % fill)

    def _pack(self, epoch: int) -> list[list[int]]:
        members = np.arange(len(self.lengths)) if self._members is None else self._members(epoch)
        bins = pack_epoch(self.lengths[members], self.cutoff_len, self.seed, epoch, self.shuffle)
        return [members[samples].tolist() for samples in bins]

    def steps(self, epochs: float, per_step: int) -> int:
        """Steps of `per_step` packed sequences in so many epochs, each of which ends one."""
        whole, part = divmod(epochs, 1)
        steps = [-(-len(self.epoch(epoch)) // per_step) for epoch in range(math.ceil(epochs))]
        # what floats add to 0.1 * 10 is no step more
        return sum(steps[: int(whole)]) + (max(1, math.ceil(part * steps[-1] - 1e-6)) if part else 0)

    def micro_batches(
        self, rank: int, world_size: int, size: int, start: int = 0, fill: int = 1
    ) -> Iterator[list[list[int]]]:
        """A rank's endless micro-batches, each of `size` packed sequences, from number `start` on.

        Micro-batches are counted over all micro-steps of a run. Number m takes, on rank r, the
        `size` packed sequences from (m * world_size + r) * size on. Empty ones fill up each epoch
        to a multiple of `fill`.
        """
        epoch, first, packed = 0, 0, self._filled(0, fill)  # first: the number of the epoch's first packed sequence
        for micro_batch in count(start):
            begin = (micro_batch * world_size + rank) * size
            chosen = []
            for number in range(begin, begin + size):
                while number >= first + len(packed):
                    first += len(packed)
                    epoch += 1
                    packed = self._filled(epoch, fill)
                chosen.append(packed[number - first])
            yield chosen
