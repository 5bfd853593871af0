"""What a server of the export would do otherwise than the training, beside transformers."""

import json
import shutil
from pathlib import Path

import pytest
from mistakes import BASIC, place, whole
from tokenizer_fixture import PUBLISHED, make_tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.models.qwen3_5_moe import Qwen3_5MoeConfig

from qwen35.config.load import load_settings
from qwen35.data import MicroBatches
from qwen35.data.serving import GENERATION_CONFIG, stop_tokens

__all__ = ["place", "whole"]  # fixtures

PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
THOUGHT = [PLAIN[0], {"role": "assistant", "content": "Yo", "reasoning_content": "Hm"}]
END, PAD = (make_tokenizer().token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>"))


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    name_ends([END, PAD])


def name_ends(ids, tokenizer="<|im_end|>"):
    Path("hf", GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": ids}))
    config = json.loads(Path("hf/tokenizer_config.json").read_text())
    Path("hf/tokenizer_config.json").write_text(json.dumps(config | {"eos_token": tokenizer}))


def notes(*conversations, template="chat_template.jinja", settings=()):
    shutil.copy(PUBLISHED / template, "hf/chat_template.jinja")
    Path("data/s.json").write_text(json.dumps([{"messages": turns} for turns in conversations]))
    settings = [f"{BASIC}.dataset=data/s.json", f"{BASIC}.cutoff_len=400", *settings]
    return MicroBatches(load_settings("r.yaml", settings), 0, 1).notes


THINKS, DOES_NOT = "chat_template.jinja", "chat_template_nothink.jinja"  # by default


OLD, NEW = "chat_template_qwen3_6.jinja", "chat_template_qwen3_8.jinja"
PLAIN_FORM = f"{BASIC}.template=qwen3_vl_nothink"
AFTER_EMPTY = "all answers are trained after an empty think block, and hf/chat_template.jinja opens one: ask"
AFTER_OPEN = "all answers are trained after an open think block, and hf/chat_template.jinja writes an empty one: ask"
NO_BLOCK = "qwen3_vl_nothink trains answers after no think block, and servers write one by hf/chat_template.jinja; "


@pytest.mark.parametrize(
    ("template", "conversations", "settings", "start", "asked"),
    [
        (THINKS, [PLAIN, PLAIN * 2], [], AFTER_EMPTY, {"enable_thinking": False}),
        (THINKS, [THOUGHT], [f"{BASIC}.enable_thinking=false"], AFTER_EMPTY, {"enable_thinking": False}),
        (THINKS, [PLAIN, THOUGHT], [], "", {}),
        (THINKS, [THOUGHT], [], "", {}),
        (THINKS, [PLAIN], [PLAIN_FORM], NO_BLOCK, {}),
        (DOES_NOT, [PLAIN], [PLAIN_FORM], NO_BLOCK, {}),
        (DOES_NOT, [THOUGHT], [], AFTER_OPEN, {"enable_thinking": True}),
        (DOES_NOT, [PLAIN, THOUGHT], [], "", {}),
        (DOES_NOT, [PLAIN], [], "", {}),
        (OLD, [THOUGHT], [f"{BASIC}.preserve_thinking=false"], "", {}),
        (OLD, [THOUGHT], [f"{BASIC}.preserve_thinking=true"], "preserve_thinking of the", {"preserve_thinking": True}),
        (NEW, [PLAIN], [], AFTER_EMPTY, {"enable_thinking": False}),
        (NEW, [THOUGHT], [f"{BASIC}.reasoning_effort=xhigh", f"{BASIC}.preserve_thinking=true"], "", {}),
        (
            NEW,
            [THOUGHT],
            [f"{BASIC}.reasoning_effort=low", f"{BASIC}.preserve_thinking=false"],
            "preserve_thinking and reasoning_effort of the recipe are not the default of hf/chat_template.jinja: ask",
            {"preserve_thinking": False, "reasoning_effort": "low"},
        ),
    ],
)
def test_prompts_that_no_server_writes_by_default_are_told(template, conversations, settings, start, asked):
    lines = notes(*conversations, template=template, settings=settings)
    assert len(lines) == bool(start)
    assert all(line.startswith(start) for line in lines)
    assert not asked or f" chat_template_kwargs {json.dumps(asked)} (vLLM" in lines[0]


@pytest.mark.parametrize("thinks", [True, False])
def test_with_what_is_advised_the_template_writes_the_trained_prompt(thinks):
    """As transformers renders it, token by token."""
    template, turns = (DOES_NOT, THOUGHT) if thinks else (THINKS, PLAIN)
    (line,) = notes(turns, template=template)
    advised = json.loads(line.partition("chat_template_kwargs ")[2].partition(" (vLLM")[0])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file="hf/tokenizer.json", chat_template=Path("hf/chat_template.jinja").read_text()
    )
    dataset = MicroBatches(load_settings("r.yaml", [f"{BASIC}.dataset=data/s.json"]), 0, 1).dataset
    ids, trained = dataset.files[0].ids.tolist(), dataset.files[0].loss_mask.tolist()
    for given, is_same in ((advised, True), ({}, False)):
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False, **given)
        encoded = tokenizer.encode(prompt, add_special_tokens=False)
        assert (ids[: trained.index(True)] == encoded) == is_same


@pytest.mark.parametrize(
    ("ids", "tokenizer", "who"),
    [
        (PAD, "<|endoftext|>", "servers and transformers' generate() do not stop"),
        ([PAD], "<|im_end|>", "transformers' generate() does not stop"),
        (None, "<|im_end|>", "transformers' generate() does not stop"),  # config.json names the other one
        ([PAD, END], "<|endoftext|>", ""),
        (END, "<|im_end|>", ""),
    ],
)
def test_ends_at_which_servers_do_not_stop_are_told(ids, tokenizer, who):
    name_ends(ids, tokenizer)
    lines = notes(PLAIN, THOUGHT)
    assert len(lines) == bool(who)
    assert not who or f"where {who} by hf/{GENERATION_CONFIG}" in lines[0]
    assert not who or f'"eos_token_id": [{END}, {PAD}]' in lines[0]


def test_answers_longer_than_those_that_servers_give_are_told():
    """Base models limit them; each answer of a record counts by itself."""
    long = [PLAIN[0], {"role": "assistant", "content": "a b c d e f g h i j k l m n"}]
    for limit, count in ((8, "2 trained answers"), (2048, ""), (None, "")):
        file = Path("hf", GENERATION_CONFIG)
        file.write_text(json.dumps({"eos_token_id": [END, PAD], "max_new_tokens": limit}))
        told = [line for line in notes(PLAIN, long, PLAIN + long, template=DOES_NOT) if "max_new_tokens" in line]
        assert [line.partition(" of more")[0] for line in told] == [count] * bool(count)
        assert not told or f" than {limit} tokens, " in told[0]


def test_the_tokens_are_those_at_which_transformers_stops(tmp_path):
    """Those of generation_config.json, else of config.json."""
    for level in ("", "text_config"):
        config = {"model_type": "qwen3_5_moe", "text_config": {}}
        (config[level] if level else config)["eos_token_id"] = 7
        (tmp_path / "config.json").write_text(json.dumps(config))
        theirs = GenerationConfig.from_model_config(Qwen3_5MoeConfig.from_pretrained(tmp_path)).eos_token_id
        assert {theirs} == stop_tokens(tmp_path, "config.json") == {7}
    (tmp_path / GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert set(GenerationConfig.from_pretrained(tmp_path).eos_token_id) == stop_tokens(tmp_path, GENERATION_CONFIG)


def test_tokens_that_somebody_added_are_found_in_the_data():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<|sep|>", "<|unused|>"])
    tokenizer.add_tokens(["<plain>"])
    tokenizer.save("hf/tokenizer.json")
    turns = [PLAIN[0], {"role": "assistant", "content": "a <|sep|> <plain> <|box_start|> b"}]
    Path("data/s.json").write_text(json.dumps([{"messages": PLAIN}, {"messages": turns}]))
    Path("data/t.json").write_text(json.dumps([{"messages": PLAIN}]))
    for file, names in (("s", ["<|sep|>", "<plain>"]), ("t", [])):
        settings = load_settings("r.yaml", [f"{BASIC}.dataset=data/{file}.json"])
        assert MicroBatches(settings, 0, 1).dataset.new_tokens() == names
