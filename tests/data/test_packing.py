"""Packing: each sample comes once, bins are nearly full, and any number of ranks sees the same."""

from itertools import islice

import numpy as np
import pytest

from qwen35.data.packing import PackedSequences, moved_forward, pack_epoch

LLAVA = np.clip(np.random.default_rng(0).lognormal(5.9, 0.5, 20_000).astype(int), 40, 2048)  # about 400 tokens


def check_epoch(bins, lengths, cutoff_len):
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in b) for b in bins) <= cutoff_len
    assert all(bins)


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_sample_comes_once_and_bins_are_full(shuffle):
    bins = pack_epoch(LLAVA, 2048, seed=1, epoch=0, shuffle=shuffle)
    check_epoch(bins, LLAVA, 2048)
    share = LLAVA.sum() / (len(bins) * 2048)
    assert share > (0.99 if shuffle else 0.95), share


@pytest.mark.parametrize(
    ("low", "high", "cutoff_len", "least"),
    [
        (290, 450, 2048, 0.995),
        (40, 2048, 2048, 0.95),
        (60, 90, 2048, 0.995),
        (290, 450, 16384, 0.99),
        (1100, 2048, 2048, 0.7),
    ],
)
def test_bins_are_full_whatever_the_lengths(low, high, cutoff_len, least):
    lengths = np.random.default_rng(2).integers(low, high, 4000)
    bins = pack_epoch(lengths, cutoff_len, seed=1, epoch=0)
    check_epoch(bins, lengths, cutoff_len)
    assert lengths.sum() / (len(bins) * cutoff_len) > least


@pytest.mark.parametrize("cutoff_len", [256, 512, 1024, 2048, 4096])
def test_no_packing_has_many_fewer_bins(cutoff_len):
    """Short bins stay partly empty where most samples fill over half; no packing is much better."""
    lengths = np.minimum(LLAVA[:8000], cutoff_len)
    bins = pack_epoch(lengths, cutoff_len, seed=1, epoch=0)
    check_epoch(bins, lengths, cutoff_len)
    fewest = max(lengths.sum() / cutoff_len, (2 * lengths > cutoff_len).sum())
    assert len(bins) <= 1.01 * fewest
    if cutoff_len >= 1024:
        assert lengths.sum() / (len(bins) * cutoff_len) > 0.985


def test_order_is_a_function_of_seed_and_epoch():
    lengths = LLAVA[:500]
    orders = [pack_epoch(lengths, 2048, seed, epoch) for seed, epoch in [(1, 0), (1, 0), (1, 1), (2, 0)]]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] and orders[0] != orders[3] and orders[2] != orders[3]


def test_long_samples_do_not_come_first():
    bins = pack_epoch(LLAVA, 2048, seed=1, epoch=0)
    longest = [max(LLAVA[i] for i in b) for b in bins]
    halves = np.array_split(longest, 2)
    assert abs(halves[0].mean() / halves[1].mean() - 1) < 0.05


def test_without_shuffling_samples_keep_their_order():
    assert pack_epoch(np.array([5, 5, 5, 5, 5]), 10, 0, 0, shuffle=False) == [[0, 1], [2, 3], [4]]
    assert pack_epoch(np.array([6, 6, 4, 3, 2]), 10, 0, 3, shuffle=False) == [[0, 2], [1, 3], [4]]
    bins = pack_epoch(LLAVA[:3000], 2048, 0, 0, shuffle=False)
    firsts = [b[0] for b in bins]
    assert firsts == sorted(firsts)


def test_samples_that_packing_takes_forward_are_counted():
    assert moved_forward([[0, 1], [2, 3], [4]]) == (0, 0)
    assert moved_forward([[0, 2], [1, 3], [4]]) == (1, 1)
    assert moved_forward([[0, 4], [1], [2, 5], [3]]) == (2, 3)


def test_samples_as_long_as_a_bin_fit_and_longer_ones_do_not():
    assert pack_epoch(np.array([10, 10]), 10, 0, 0, shuffle=False) == [[0], [1]]
    assert len(pack_epoch(np.array([10, 1, 9, 10]), 10, 0, 0)) == 3
    with pytest.raises(ValueError, match="a sample of 11 tokens does not fit into a bin of 10"):
        pack_epoch(np.array([3, 11]), 10, 0, 0)


def stream(lengths, ranks, size, steps, start=0, seed=3):
    """The packed sequences that `ranks` ranks see in `steps` micro-steps, in order."""
    seen = [
        list(islice(PackedSequences(lengths, 2048, seed).micro_batches(rank, ranks, size, start), steps))
        for rank in range(ranks)
    ]
    return [sequence for micro_step in zip(*seen, strict=True) for batch in micro_step for sequence in batch]


def test_any_number_of_ranks_sees_the_same_sequences_in_the_same_order():
    lengths = LLAVA[:300]
    one = stream(lengths, 1, 1, 240)
    assert stream(lengths, 2, 1, 120) == stream(lengths, 4, 2, 30) == stream(lengths, 3, 4, 20) == one


def test_every_epoch_has_each_sample_once():
    lengths = LLAVA[:300]
    sequences = PackedSequences(lengths, 2048, 3)
    seen = stream(lengths, 2, 3, 40)
    first = 0
    for epoch in range(3):
        n = len(sequences.epoch(epoch))
        check_epoch(seen[first : first + n], lengths, 2048)
        first += n
    assert first <= len(seen)


def test_resuming_needs_only_the_step():
    lengths = LLAVA[:300]
    whole = stream(lengths, 2, 2, 60)
    for start in (0, 1, 17, 59):
        assert stream(lengths, 2, 2, 60 - start, start) == whole[start * 4 :]


@pytest.mark.parametrize("per_step", [1, 7, 64, 10_000])
def test_epochs_are_counted_in_whole_steps(per_step):
    """Against the packed sequences of each epoch, counted one by one."""
    sequences = PackedSequences(LLAVA[:3000], 2048, seed=5)
    each = [len(range(0, len(sequences.epoch(epoch)), per_step)) for epoch in range(3)]
    assert [sequences.steps(epochs, per_step) for epochs in (1, 2, 3)] == [each[0], sum(each[:2]), sum(each)]
    for tenths in range(1, 10):  # a part of an epoch is rounded up to a step
        first, third = (next(n for n in range(1, e + 1) if 10 * n >= tenths * e) for e in (each[0], each[2]))
        assert sequences.steps(tenths / 10, per_step) == first
        assert sequences.steps(2 + tenths / 10, per_step) == sum(each[:2]) + third


def test_each_epoch_is_filled_up_to_whole_steps():
    sequences = PackedSequences(LLAVA[:1000], 2048, seed=5)
    ranks, size, accumulated = 3, 2, 2
    fill = ranks * size * accumulated
    assert all(len(sequences.epoch(epoch)) % fill for epoch in (0, 1))
    for epochs in (1, 2):
        count = sequences.steps(epochs, fill) * accumulated
        streams = [islice(sequences.micro_batches(rank, ranks, size, 0, fill), count) for rank in range(ranks)]
        seen = [content for micro_batches in zip(*streams, strict=True) for batch in micro_batches for content in batch]
        assert sorted(sample for content in seen for sample in content) == sorted([*range(1000)] * epochs)
        assert [content for content in seen if content] == [c for e in range(epochs) for c in sequences.epoch(e)]
        assert seen.count([]) == sum(-len(sequences.epoch(epoch)) % fill for epoch in range(epochs))
    second = [*islice(sequences.micro_batches(1, ranks, size, count // 2, fill), count // 2)]
    assert second == [*islice(sequences.micro_batches(1, ranks, size, 0, fill), count)][count // 2 :]
