"""Which samples share a bin, and in which order the bins come: a function of lengths, seed and epoch alone."""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

POOL = 128  # shuffled: samples that a bin may choose from
OPEN_BINS = 64  # in order: how far a sample may move forward to fill a gap


def pack_epoch(lengths: np.ndarray, cutoff_len: int, seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
    """lengths [N] -> bins of sample indices, each sample in one bin, each bin at most cutoff_len tokens.

    Shuffled: in a random order, each bin takes the next sample (or a later one of more than half a bin, which is hard to
    place) and those of the following POOL that fill it best; then the bins in random order. Else in the order given, each
    sample into the first of the open bins that still holds it.
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
        chosen = set(_fullest([lengths[sample] for sample in pool], cutoff_len - lengths[first]))
        bins.append([first, *(sample for i, sample in enumerate(pool) if i in chosen)])
        pool = [sample for i, sample in enumerate(pool) if i not in chosen]
        pool += islice(waiting, POOL - len(pool))
    return bins


def _fullest(lengths: list[int], space: int) -> list[int]:
    """Which of the lengths come closest to `space` together, without exceeding it; the earlier ones where several do."""
    space = min(space, sum(lengths))
    within = (1 << (space + 1)) - 1
    sums = [1]  # bit s of sums[i]: some of the first i lengths add up to s
    for length in lengths:
        sums.append(sums[-1] | (sums[-1] << length) & within)
        if sums[-1] >> space:
            break
    left = sums[-1].bit_length() - 1
    chosen = []
    for i in range(len(sums) - 2, -1, -1):
        if not sums[i] >> left & 1:
            chosen.append(i)
            left -= lengths[i]
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


class PackedSequences:
    """The bins of all epochs end to end, numbered from 0."""

    def __init__(
        self,
        lengths: np.ndarray,
        cutoff_len: int,
        seed: int,
        shuffle: bool = True,
        members: Callable[[int], np.ndarray] | None = None,
    ):
        """members: the samples of an epoch, some of them more than once or not at all; None: each once."""
        self.lengths, self.cutoff_len, self.seed, self.shuffle = lengths, cutoff_len, seed, shuffle
        self._members = members
        self._last: tuple[int, list[list[int]]] | None = None  # the epoch packed last: the first is asked for twice

    def epoch(self, epoch: int) -> list[list[int]]:
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, self._pack(epoch)
        return self._last[1]

    def _pack(self, epoch: int) -> list[list[int]]:
        members = np.arange(len(self.lengths)) if self._members is None else self._members(epoch)
        bins = pack_epoch(self.lengths[members], self.cutoff_len, self.seed, epoch, self.shuffle)
        return [members[content].tolist() for content in bins]

    def micro_batches(self, rank: int, world_size: int, bins: int, start: int = 0) -> Iterator[list[list[int]]]:
        """The micro-batches of a rank, `bins` bins each, without end.

        Micro-batch m (counted from the first step of the run, accumulation included) of rank r takes the bins
        (m * world_size + r) * bins …; `start` is the first m.
        """
        epoch, first, packed = 0, 0, self.epoch(0)
        micro_batch = start
        while True:
            numbers = range((micro_batch * world_size + rank) * bins, (micro_batch * world_size + rank + 1) * bins)
            chosen = []
            for number in numbers:
                while number >= first + len(packed):
                    first += len(packed)
                    epoch += 1
                    packed = self.epoch(epoch)
                chosen.append(packed[number - first])
            yield chosen
            micro_batch += 1
