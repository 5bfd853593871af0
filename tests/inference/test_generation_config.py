"""Sampling by generation_config.json and command line, and what of the file is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from peer import config_dict, continued, pair, peer_inputs, sample
from transformers import GenerationConfig

from qwen35.errors import SettingError
from qwen35.inference import generate
from qwen35.inference.generation_config import (
    HARMLESS,
    NEUTRAL,
    greedy_sampling,
    read_generation_config,
    sampling_of,
    stop_ids,
)
from qwen35.inference.sampling import Sampling

ENDS = {"bos_token_id": 248044, "eos_token_id": [248046, 248044], "pad_token_id": 248044}
PUBLISHED = {  # with Qwen3.5-27B and 397B-A17B
    **ENDS,
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.57.0.dev0",
}


def write(folder: Path, values: dict) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def chosen(folder: Path, values: dict, *words: str) -> Sampling:
    """Options parsed as by `make generate`."""
    config = read_generation_config(write(folder, values))
    args = generate.parse(["--model", "m", "--seed", "3", *words])
    return sampling_of(args, config, drawn=not args.greedy)


DRAWN = Sampling(0.6, 20, 0.95, seed=3)
CASES = [
    (PUBLISHED, [], DRAWN),
    (PUBLISHED | {"temperature": 1.0}, [], replace(DRAWN, temperature=1.0)),  # with 35B-A3B
    (PUBLISHED, ["--greedy"], Sampling(seed=3)),
    (PUBLISHED, ["--temperature", "0"], Sampling(seed=3)),
    (PUBLISHED, ["--top_p", "0.5", "--min_p", "0.1"], replace(DRAWN, top_p=0.5, min_p=0.1)),
    (PUBLISHED, ["--top_k", "0"], replace(DRAWN, top_k=None)),
    (PUBLISHED | {"do_sample": False}, [], Sampling(seed=3)),  # as in transformers
    (PUBLISHED | {"do_sample": None}, [], Sampling(seed=3)),
    (PUBLISHED | {"do_sample": False}, ["--temperature", "2"], replace(DRAWN, temperature=2.0)),
    (PUBLISHED | {"temperature": 0}, [], Sampling(seed=3)),
    ({"do_sample": True}, [], Sampling(1.0, seed=3)),
    ({"do_sample": True, "top_k": 0}, [], Sampling(1.0, seed=3)),
    ({"do_sample": True, "top_k": -1}, [], Sampling(1.0, seed=3)),
    (ENDS, [], Sampling(seed=3)),
    (ENDS, ["--temperature", "0.7"], Sampling(0.7, seed=3)),
    (ENDS, ["--repetition_penalty", "1.2"], Sampling(repetition_penalty=1.2, seed=3)),
    (
        PUBLISHED | {"repetition_penalty": 1.05, "presence_penalty": 1.5, "min_p": 0.05},
        ["--presence_penalty", "1"],
        replace(DRAWN, min_p=0.05, repetition_penalty=1.05, presence_penalty=1.0),
    ),
    (
        PUBLISHED | {"repetition_penalty": 1.05, "presence_penalty": 1.5, "min_p": 0.05},
        ["--greedy"],
        Sampling(repetition_penalty=1.05, presence_penalty=1.5, seed=3),
    ),
]


@pytest.mark.parametrize(("values", "words", "wanted"), CASES)
def test_options_override_the_file_and_the_file_the_defaults(tmp_path, values, words, wanted):
    assert chosen(tmp_path, values, *words) == wanted


def test_the_default_without_a_file_is_greedy(tmp_path):
    assert read_generation_config(tmp_path) == {}
    assert greedy_sampling({}) == Sampling()
    assert greedy_sampling(PUBLISHED | {"repetition_penalty": 1.3}) == Sampling(repetition_penalty=1.3)


@pytest.mark.parametrize("word", ["--top_k", "--top_p", "--min_p"])
@pytest.mark.parametrize("more", [["--greedy"], ["--temperature", "0"]])
def test_options_without_effect_are_refused(tmp_path, word, more):
    with pytest.raises(SettingError, match=f"{word} means nothing where the likeliest token is taken"):
        chosen(tmp_path, PUBLISHED, word, "1", *more)


def test_without_a_seed_each_run_has_another(tmp_path):
    args = generate.parse(["--model", "m", "--temperature", "1"])
    seeds = {sampling_of(args, {}, drawn=True).seed for _ in range(5)}
    assert len(seeds) == 5


REFUSED = [
    {"num_beams": 4},
    {"min_new_tokens": 5},
    {"no_repeat_ngram_size": 3},
    {"typical_p": 0.9},
    {"top_h": 0.4},
    {"frequency_penalty": 0.5},
    {"suppress_tokens": [1]},
    {"bad_words_ids": [[5]]},
    {"stop_strings": ["\n"]},
    {"sequence_bias": [[[1], 2.0]]},
    {"watermarking_config": {}},
    {"temprature": 0.6},
]


@pytest.mark.parametrize("values", REFUSED, ids=lambda v: next(iter(v)))
def test_unsupported_values_are_refused_by_name(tmp_path, values):
    name = next(iter(values))
    with pytest.raises(SettingError, match=rf"generation_config\.json: {name}: .* may change the answers, and is not"):
        read_generation_config(write(tmp_path, PUBLISHED | values))
    assert read_generation_config(write(tmp_path, PUBLISHED | {name: None})) == PUBLISHED  # null is not given


def test_values_that_change_no_answer_are_accepted(tmp_path):
    values = dict.fromkeys(HARMLESS, 7) | NEUTRAL
    assert greedy_sampling(read_generation_config(write(tmp_path, values))) == Sampling()


def test_neutral_values_are_neutral_in_transformers():
    known = {name: value for name, value in NEUTRAL.items() if hasattr(GenerationConfig(), name)}
    assert len(known) > 10
    _, peer = pair(config_dict(moe=False))
    inputs = peer_inputs(sample([9], seed=1))
    assert continued(peer, inputs, 12, **known) == continued(peer, inputs, 12)


def test_files_that_transformers_saves_are_read(tmp_path):
    GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, eos_token_id=[1, 2]).save_pretrained(
        tmp_path
    )
    args = generate.parse(["--model", "m", "--seed", "3"])
    assert sampling_of(args, read_generation_config(tmp_path), drawn=True) == DRAWN
    write(tmp_path, GenerationConfig().to_dict())
    assert greedy_sampling(read_generation_config(tmp_path)) == Sampling()


MISTAKES = [
    ({"temperature": "hot"}, "temperature: hot is not a number"),
    ({"temperature": True}, "temperature: True is not a number"),
    ({"temperature": -1}, "temperature -1 must be 0 or more"),
    ({"temperature": math.nan}, "temperature nan must be 0 or more"),
    ({"top_k": 2.5}, "top_k: 2.5 is not a whole number"),
    ({"top_k": -2}, "top_k -2 must be at least 1"),
    ({"top_p": 1.5}, "top_p 1.5 must be above 0, and at most 1"),
    ({"min_p": 2}, "min_p 2 must be from 0 to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty 0 must be above 0"),
    ({"do_sample": "yes"}, "do_sample: yes is not true or false"),
    ({"max_new_tokens": 0}, "max_new_tokens: 0 is not a whole number from 1"),
]


@pytest.mark.parametrize(("values", "words"), MISTAKES)
def test_a_wrong_value_names_the_file(tmp_path, values, words):
    with pytest.raises(SettingError) as error:
        read_generation_config(write(tmp_path, values))
    assert str(error.value) == f"{tmp_path}/generation_config.json: {words}"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ends", ["<|im_end|>", [1, "2"], [True], 1.5])
def test_eos_ids_that_are_no_integers_are_refused(tmp_path, file, ends):
    tokenizer = SimpleNamespace(im_end_id=1, pad_id=2)
    (tmp_path / file).write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(SettingError) as error:
        stop_ids(tmp_path, tokenizer)
    assert str(error.value) == f"{tmp_path}/{file}: eos_token_id: {ends} is no token's number"
