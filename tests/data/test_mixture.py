"""Weighted files: what an epoch holds depends on seed and epoch alone; the setting is a list."""

from collections import Counter

import numpy as np
import pytest

from qwen35.config.load import SettingError, load_settings, to_yaml
from qwen35.config.schema import DatasetFile, dataset_entries
from qwen35.data.mixture import Mixture, dataset_files, dataset_name
from qwen35.data.packing import PackedSequences


def test_weight_1_gives_every_sample_once():
    for shuffle in (True, False):
        assert Mixture((3, 0, 2), (1, 1, 1), 7, shuffle).epoch(5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.7, 1.3, 2.0, 3.25])
@pytest.mark.parametrize("shuffle", [True, False])
def test_weight_is_how_often_a_sample_comes(weight, shuffle):
    mixture, seen = Mixture((10, 7), (1, weight), 3, shuffle), Counter()
    for epoch in range(40):
        members = mixture.epoch(epoch)
        assert members.tolist() == Mixture((10, 7), (1, weight), 3, shuffle).epoch(epoch).tolist()
        once, often = members[members < 10], members[members >= 10]
        assert once.tolist() == list(range(10)) and often.max(initial=0) < 17
        assert abs(len(often) - 7 * weight) <= 1
        seen.update(often.tolist())
        counts = [seen[sample] for sample in range(10, 17)]
        assert max(counts) - min(counts) <= 1  # no sample is a pass ahead of another
    assert abs(sum(seen.values()) - 40 * 7 * weight) < 1


def test_seeds_and_epochs_differ():
    draws = {tuple(Mixture((50,), (0.5,), seed).epoch(epoch).tolist()) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert len(draws) == 6
    halves = [Mixture((50,), (0.5,), 1).epoch(epoch).tolist() for epoch in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(50))


def test_packed_sequences_hold_an_epoch_for_any_number_of_ranks():
    lengths = np.random.default_rng(0).integers(10, 900, 60)
    mixture = Mixture((20, 40), (2.5, 0.5), 11)
    sequences = PackedSequences(lengths, 1000, 11, members=mixture.epoch)
    for epoch in (0, 1, 2):
        packed = sequences.epoch(epoch)
        assert sorted(sample for content in packed for sample in content) == sorted(mixture.epoch(epoch).tolist())
        assert all(lengths[content].sum() <= 1000 for content in packed)
    first = [content for epoch in (0, 1, 2) for content in sequences.epoch(epoch)]
    ranks = [sequences.micro_batches(rank, 2, 1, start=3) for rank in (0, 1)]
    assert [next(ranks[i % 2])[0] for i in range(8)] == first[6:14]


RECIPE = """
data: {dataset_param: {basic_parameters: {dataset: %s}}}
model: {model_name_or_path: m}
training: {train_iters: 1, save: s}
"""
BASIC = "data.dataset_param.basic_parameters"


def dataset(tmp_path, value, *overrides):
    (tmp_path / "r.yaml").write_text(RECIPE % value)
    return load_settings(tmp_path / "r.yaml", overrides).data.dataset_param.basic_parameters.dataset


def test_dataset_is_a_string_or_a_list(tmp_path):
    assert dataset(tmp_path, "'a.json, b.json'") == "a.json, b.json"
    listed = dataset(tmp_path, "[{file: a.json, weight: 2}, b.json]")
    assert listed == (DatasetFile("a.json", 2.0), DatasetFile("b.json", 1.0)) == tuple(dataset_entries(listed))
    assert dataset_entries("a.json, b.json,") == [DatasetFile("a.json"), DatasetFile("b.json")]
    assert dataset_name(listed) == "a.json,b.json" == dataset_name("a.json, b.json")
    assert dataset(tmp_path, "x", f"{BASIC}.dataset=[{{file: c.json, weight: 0.5}}]") == (DatasetFile("c.json", 0.5),)
    settings = load_settings(tmp_path / "r.yaml", [f"{BASIC}.dataset=[{{file: c.json, weight: 0.5}}]"])
    (tmp_path / "again.yaml").write_text(to_yaml(settings))
    assert load_settings(tmp_path / "again.yaml") == settings


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "[{file: a.json, wieght: 2}]",
            r"unknown setting .*\.dataset\[0\]\.wieght; did you mean .*\.dataset\[0\]\.weight\?",
        ),
        ("[{weight: 2}]", r"\.dataset\[0\]\.file is not set"),
        ("[{file: a.json, weight: 0}]", r"\.dataset\[0\]\.weight: 0 must be more than 0"),
        ("[b.json, {file: a.json, weight: .inf}]", r"\.dataset\[1\]\.weight: inf must be a finite number"),
        ("[3]", r"\.dataset\[0\]\.file: 3 is not of type str"),
        ("3", r"\.dataset: 3 is not of type str"),
    ],
)
def test_wrong_dataset_is_an_error(tmp_path, value, message):
    with pytest.raises(SettingError, match=message):
        dataset(tmp_path, value)


def test_empty_dataset_is_an_error():
    with pytest.raises(SettingError, match="names no file"):
        dataset_files(())
