"""Preference pairs: their formats, the tokens of both sides, packing, and what is refused."""

import json
import shutil
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optional import write_parquet
from PIL import Image
from tokenizer_fixture import PUBLISHED, make_model_folder
from transformers import AutoTokenizer

from qwen35.batch import IGNORE
from qwen35.config.load import from_flat
from qwen35.config.schema import Attr
from qwen35.data import MicroBatches, RecordError
from qwen35.data.__main__ import main
from qwen35.data.collator import vision_spec
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.dataset import Dataset
from qwen35.data.fields import FieldNames
from qwen35.data.formats import parse_record, read_records
from qwen35.data.image_processor import ImageProcessor
from qwen35.data.media import ImageFolder
from qwen35.data.preparation import Preparation
from qwen35.data.preview import lengths_report, show
from qwen35.data.record import Turn
from qwen35.data.tokenized import load_samples
from qwen35.data.validation import ValidationSet
from qwen35.errors import SettingError
from qwen35.training.history import first_samples
from qwen35.training.plots import lengths

BASIC = "data.dataset_param.basic_parameters"
CUTOFF = 192


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


S = {"role": "system", "content": "S"}
HISTORY = [S, user("a"), assistant("A"), user("b")]
GOOD, BAD = [*HISTORY, assistant("Good")], [*HISTORY, assistant("Bad")]
ALPACA = {"instruction": "b", "history": [["a", "A"]], "system": "S"}
SHAREGPT = {"conversations": [human("a"), gpt("A"), human("b")], "system": "S"}
FORMATS = {  # each says the same
    "trl, strings": ({"prompt": "b", "chosen": "Good", "rejected": "Bad"}, {}),
    "trl, messages": ({"prompt": HISTORY, "chosen": [GOOD[-1]], "rejected": [BAD[-1]]}, {}),
    "trl, conversations": ({"chosen": GOOD, "rejected": BAD}, {}),
    "UltraFeedback": (
        {"prompt": "b", "messages": GOOD, "chosen": GOOD, "rejected": BAD, "score_chosen": 8.0, "score_rejected": 2.0},
        {},
    ),
    "LLaMA-Factory, turns": (SHAREGPT | {"chosen": gpt("Good"), "rejected": gpt("Bad")}, {}),
    "LLaMA-Factory, strings": ({"messages": HISTORY, "chosen": "Good", "rejected": "Bad"}, {}),
    "LLaMA-Factory, Alpaca": (ALPACA | {"chosen": "Good", "rejected": "Bad", "output": ""}, {"format": "alpaca"}),
    "ms-swift": ({"messages": GOOD, "rejected_response": "Bad"}, {}),
    "ms-swift, turns": ({"messages": GOOD, "rejected_response": [BAD[-1]]}, {}),
    "ms-swift, rejected_messages": ({"messages": GOOD, "rejected_messages": BAD}, {}),
    "ms-swift, query": (
        {"query": "b", "response": "Good", "rejected_response": "Bad", "history": [["a", "A"]], "system": "S"},
        {"format": "alpaca", "prompt": "query", "response": "response"},
    ),
}


def read(folder, records, warnings=None, **attr):
    (folder / "x.json").write_text(json.dumps(records))
    return list(read_records(folder / "x.json", Attr(**attr), ImageFolder(folder), warnings=warnings, pairs=True))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same(tmp_path, name):
    raw, attr = FORMATS[name]
    warnings = DataWarnings()
    (pair,) = read(tmp_path, [raw], warnings, **attr)
    prompt = [Turn(turn["role"], turn["content"], loss=False) for turn in HISTORY]
    prompt = prompt[-1:] if name == "trl, strings" else prompt
    assert pair.turns == (*prompt, Turn("assistant", "Good"))
    assert pair.rejected.turns == (*prompt, Turn("assistant", "Bad"))
    assert pair.source == pair.rejected.source == f"{tmp_path}/x.json, record 1" and pair.rejected.rejected is None
    assert warnings.counts.keys() == ({"unnamed"} if "query" in name else set())  # LLaMA-Factory leaves history out


def test_pairs_of_a_table(tmp_path, monkeypatch):
    """Whose nulls say nothing: of each row only some columns are filled."""
    rows = [
        FORMATS[name][0] for name in ("trl, messages", "trl, conversations", "ms-swift", "ms-swift, rejected_messages")
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    write_parquet(tmp_path / "x.parquet", [{name: row.get(name) for name in columns} for row in rows], monkeypatch)
    found = list(read_records(tmp_path / "x.parquet", Attr(), ImageFolder(tmp_path), pairs=True))
    answers = [(r.turns[-1].text, r.rejected.turns[-1].text) for r in found]
    assert answers == [("Good", "Bad")] * 4
    assert {len(side.turns) for r in found for side in (r, r.rejected)} == {5}


def test_all_but_the_answers_is_shared(tmp_path):
    """Images, videos, tools, system; a list of messages may hold the images, as trl's do."""
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "v").mkdir()
    tools = [{"type": "function", "function": {"name": "f"}}]
    more = {"images": ["a.png"], "videos": ["v"], "tools": tools, "system": "S"}
    in_text = {"prompt": "<image><video>?", "chosen": "Good", "rejected": "Bad"}
    in_list = {"prompt": [user([{"type": "image"}, {"type": "video"}, {"type": "text", "text": "?"}])]}
    in_list |= {"chosen": [assistant([{"type": "text", "text": "Good"}])], "rejected": "Bad"}
    swift = {"messages": [user("<image><video>?"), assistant("Good")], "rejected_response": "Bad"}
    swift |= {"rejected_images": ["a.png"], "rejected_videos": ["v"], "rejected_tools": tools}
    found = read(tmp_path, [in_text | more, in_list | more, swift | more])
    for pair in found:
        assert pair.turns[:2] == pair.rejected.turns[:2] == found[0].turns[:2] and pair.tools == pair.rejected.tools
        assert pair.images == (tmp_path / "a.png",) and len(pair.videos) == 1 and pair.tools == tuple(tools)
        assert [side.turns[2].text for side in (pair, pair.rejected)] == ["Good", "Bad"]


def test_answers_may_call_tools(tmp_path):
    """What both begin with, calls too, is the prompt, if an answer of each follows it."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    other = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "g", "arguments": {}}}]}
    result = {"role": "tool", "content": "1"}
    good = [call, result, assistant("Good")]
    cases = [
        ({"prompt": [user("a")], "chosen": good, "rejected": [call, result, assistant("Bad")]}, 3),
        ({"prompt": [user("a")], "chosen": good, "rejected": [other, result, assistant("Good")]}, 1),
        ({"prompt": [user("a")], "chosen": good, "rejected": [call]}, 1),
        ({"prompt": [user("a")], "chosen": [call], "rejected": "Bad"}, 1),
        ({"messages": [user("a"), *good], "rejected_response": "Bad"}, 3),
        ({"messages": [user("a"), *good], "rejected_response": [assistant("Bad")]}, 1),
        (
            {"chosen": [user("a"), *good], "rejected": [user("a"), call, {**result, "content": "2"}, assistant("Bad")]},
            1,
        ),
    ]
    for pair, (_, start) in zip(read(tmp_path, [raw for raw, _ in cases]), cases, strict=True):
        for side in (pair, pair.rejected):
            assert [turn.loss for turn in side.turns] == [False] * start + [None] * (len(side.turns) - start)
        assert pair.turns[:start] == pair.rejected.turns[:start] and pair.turns != pair.rejected.turns


PROMPT = {"prompt": "b"}
PAIR = PROMPT | {"chosen": "Good", "rejected": "Bad"}
REFUSED = {
    "no rejected": (
        PROMPT | {"chosen": "Good"},
        r": has no rejected answer in rejected or rejected_response .*; it has 'p",
    ),
    "no chosen": (
        PROMPT | {"rejected": "Bad"},
        r": has no chosen answer in chosen, but training\.stage: dpo learns from",
    ),
    "plain": ({"messages": GOOD}, r": has no rejected answer"),
    "null": (PAIR | {"rejected": None}, r": has no rejected answer"),
    "no prompt": (
        {"chosen": "Good", "rejected": "Bad"},
        r": has no prompt in messages or conversations or prompt, and chosen",
    ),
    "empty prompt": (PAIR | {"prompt": []}, r": has no prompt in messages"),
    "number": (PAIR | {"rejected": 7}, r", rejected: is a number, not a text, a turn or a list of turns"),
    "number in a turn": (PAIR | {"chosen": [assistant(7)]}, r", prompt and chosen\[1\]\.content: is a number"),
    "empty answer": (PAIR | {"rejected": " \n"}, r": the rejected answer is empty; leave the pair out"),
    "empty turn": (PAIR | {"chosen": assistant("")}, r": the chosen answer is empty"),
    "ends with a question": (
        {"chosen": [*GOOD, user("c")], "rejected": BAD},
        r", chosen\[5\]: ends with a user turn; there is no answer",
    ),
    "prompts that differ": (
        {"chosen": GOOD, "rejected": [S, user("a"), assistant("A"), user("z"), assistant("Bad")]},
        r": the prompts of its two answers differ: turn 3 is 'b' and 'z'; a pair is two answers to one prompt",
    ),
    "histories that differ": (
        {"chosen": GOOD, "rejected": [S, user("a"), assistant("Z"), user("b"), assistant("Bad")]},
        r": the prompts of its two answers differ: turn 2 is 'A' and 'Z'",
    ),
    "one goes on": (
        {"chosen": [*GOOD, user("c"), assistant("C")], "rejected": BAD},
        r": the prompts of its two answers differ: turn 4 is 'Good' and 'Bad'",
    ),
    "two prompts": ({"prompt": "z", "chosen": GOOD, "rejected": BAD}, r": prompt is not what chosen begins with"),
    "two conversations": (
        {"messages": HISTORY, "prompt": "z", "chosen": "Good", "rejected": "Bad"},
        r": prompt is not what messages and chosen begins with; a pair has one prompt, keep one",
    ),
    "answered twice": (
        {"messages": GOOD, "chosen": "G", "rejected": "B"},
        r": messages ends with an answer, and there is ch",
    ),
    "two rejected": (PAIR | {"rejected_response": "x"}, r": has both rejected and rejected_response"),
    "mask": (
        PAIR | {"loss_mask": [0, 1]},
        r": has loss_mask, but of a pair the two answers are trained, and nothing else",
    ),
    "masked answer": (
        PAIR | {"chosen": assistant("Good", loss_mask=0)},
        r": turn 1 \(chosen\) is marked not to be trained",
    ),
    "marked history": (
        {"messages": [user("a"), assistant("A", loss=1), user("b")], "chosen": "Good", "rejected": "Bad"},
        r": turn 1 \(chosen\) is marked to be trained, but of a pair",
    ),
    "other images": (PAIR | {"rejected_images": ["b.png"]}, r": has rejected_images other than its images"),
    "other audio": (PAIR | {"rejected_audios": ["b.wav"]}, r": has rejected_audios, which is not read but looks like"),
    "a label": (PAIR | {"label": False}, r": has label, which is not read"),
    "a weight": (PAIR | {"weight": 0.5}, r": has weight, which is not read; a record has no weight"),
    "a loss": (PAIR | {"loss_scale": 0}, r": has loss_scale, which is not read"),
    "a weighted turn": (
        PAIR | {"chosen": assistant("Good", weight=0)},
        r": turn 1 \(chosen\) is marked not to be trained",
    ),
    "a masked question": (
        {"prompt": [{**user("b"), "loss_mask": 1}], "chosen": "Good", "rejected": "Bad"},
        r": turn 0 \(chosen\) is marked to be trained, but of a pair",
    ),
    "boxes of one answer": (
        PAIR | {"rejected": "<bbox>", "objects": {"bbox": [[0, 0, 1, 1]]}},
        r", objects\.bbox: has 1, but 0 <bbox> stand in the turns",
    ),
}


REFUSED_RAW = [raw for raw, _ in REFUSED.values()]
FIELDS = st.sampled_from(
    "prompt chosen rejected rejected_response rejected_messages messages conversations instruction output history system "
    "tools loss_mask role content from value id".split()
)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_pair_is_refused_in_one_line(tmp_path, name):
    raw, message = REFUSED[name]
    with pytest.raises(RecordError, match=rf"^{tmp_path}/x\.json, record 2{message}") as caught:
        read(tmp_path, [PAIR, raw])
    assert "\n" not in str(caught.value)


TURNS = [*GOOD, BAD[-1], gpt("x"), human("y"), {"human": "a", "gpt": "b"}, {"role": "tool", "content": "1"}]
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from([*TURNS, GOOD, BAD, HISTORY])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=3))
RAW = st.dictionaries(FIELDS, VALUES, max_size=5)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=RAW, format_=st.sampled_from(["sharegpt", "alpaca"]), base=st.sampled_from([{}, PAIR, *REFUSED_RAW]))
def test_anything_is_a_pair_or_one_line(tmp_path, raw, format_, base):
    names, line = FieldNames.of(Attr(format=format_), pairs=True), "x"
    try:
        pair = parse_record(base | raw, "x", names, ImageFolder(tmp_path), DataWarnings())
        both = pair.turns, pair.rejected.turns
        start = [turn.loss for turn in pair.turns].index(None)
        assert both[0][:start] == both[1][:start] and all(turns[start].role == "assistant" for turns in both)
        assert all(turn.loss is None and turn.role != "user" for turns in both for turn in turns[start:])
        assert pair.tools == pair.rejected.tools
    except RecordError as error:
        line = str(error)
    assert line.startswith("x") and "\n" not in line


def test_what_is_odd_is_counted_once(tmp_path):
    """Though the prompt is read with either answer."""
    warnings = DataWarnings()
    turns = [user("<image>"), assistant("A"), user("b")]
    raw = {"messages": turns, "chosen": "Good", "rejected": {**assistant("<tool_call>"), "mood": 3}, "mood": 1}
    read(tmp_path, [raw], warnings)
    counts = {kind: {name: n for name, (n, _) in found.items()} for kind, found in warnings.counts.items()}
    unread = {"mood": 1, "messages and rejected[].mood": 1}
    assert counts == {"literal": {"": 1}, "tags": {"": 1}, "unread": unread}


@pytest.mark.parametrize(("name", "good", "bad", "count"), [
    ("{}_score", 2, 9.5, 1), ("score_{}", 7.0, 7, 1), ("{}_rating", 3, 5, 1), ("{}_score", 9, 2, 0), ("{}_model", "a", "b", 0),
    ("{}_score", None, 9, 0),
])  # fmt: skip
def test_pairs_whose_scores_say_otherwise_are_counted(tmp_path, name, good, bad, count):
    warnings = DataWarnings()
    scores = {name.format("chosen"): good, name.format("rejected"): bad}
    read(tmp_path, [{"prompt": "b", "chosen": "Good", "rejected": "Bad"} | scores], warnings)
    assert [line.partition(";")[0] for line in warnings.lines()] == [
        "1 pair has no higher score of the chosen answer than of the rejected one"
    ] * count


def test_attr_may_name_what_fine_tuning_has_read(tmp_path):
    raw = {"chosen": GOOD, "rejected": BAD}
    (plain,) = read(tmp_path, [raw])
    assert (
        read(tmp_path, [raw], messages="chosen")
        == read(tmp_path, [raw | {"prompt": "z"}], ignore=["prompt"])
        == [plain]
    )
    own = {"talk": [{"who": "Q", "said": "b"}], "chosen": {"who": "A", "said": "Good"}, "rejected": "Bad"}
    (pair,) = read(
        tmp_path, [own], messages="talk", role_tag="who", content_tag="said", user_tag="Q", assistant_tag="A"
    )
    assert [turn.text for side in (pair, pair.rejected) for turn in side.turns] == ["b", "Good", "b", "Bad"]
    (pair,) = read(tmp_path, [raw | {"talk": GOOD}], messages="talk")
    assert pair == plain


NAMED = {  # what attr names is where the usual names are; a field `chosen` may then say which of two it is
    "texts": {"ask": "b", "good": "Good", "bad": "Bad", "chosen": 0},
    "turns": {"ask": [user("b")], "good": [assistant("Good")], "bad": assistant("Bad")},
    "conversations": {"good": [user("b"), assistant("Good")], "bad": [user("b"), assistant("Bad")]},
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("format_", ["sharegpt", "alpaca"])
def test_attr_names_the_prompt_and_the_answers(tmp_path, name, format_):
    warnings, raw = DataWarnings(), NAMED[name]
    if format_ == "alpaca" and name != "texts":
        raw = raw | {"ask": "b"}
    attr = {"format": format_, "prompt": "ask", "chosen": "good", "rejected": "bad"}
    (pair,) = read(tmp_path, [raw], warnings, **attr)
    assert [[turn.text for turn in side.turns] for side in (pair, pair.rejected)] == [["b", "Good"], ["b", "Bad"]]
    assert warnings.counts.keys() == ({"unread"} if "chosen" in raw else set())
    dotted = {"ask": "b", "of": {"good": "Good", "bad": "Bad"}}
    attr |= {"chosen": "of.good", "rejected": "of.bad"}
    (pair,) = read(tmp_path, [dotted], **attr)
    assert (pair.turns[1].text, pair.rejected.turns[1].text) == ("Good", "Bad")
    with pytest.raises(RecordError, match=r"has no rejected answer in of\.bad or rejected or rejected_response"):
        read(tmp_path, [{"ask": "b", "of": {"good": "Good"}}], **attr)


def test_a_name_that_no_pair_has_is_an_error(home, folder):
    entry = [
        {"file": f"{home}/pairs.json"},
        {"file": f"{home}/named.json", "attr": {"chosen": "good", "rejected": "bad"}},
    ]
    (home / "named.json").write_text(json.dumps([{"prompt": "b", "good": "Good", "bad": "Bad"}]))
    assert len(MicroBatches(recipe(home, folder, **{f"{BASIC}.dataset": entry}), 0, 1).dataset) == 41
    (home / "named.json").write_text(json.dumps([PAIR]))
    with pytest.raises(
        SettingError, match=r"dataset\[1\]\.attr\.chosen: no record of .*named\.json has a field 'good'"
    ):
        MicroBatches(recipe(home, folder, **{f"{BASIC}.dataset": entry}), 0, 1)


# -- tokens ----------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    """pairs.json: 40 records, of which every third has one or two images; and more.json of 10."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(40):
        names = [f"{i}_{j}.png" for j in range(i % 3)]
        for name in names:
            Image.fromarray(rng.integers(0, 255, (*rng.integers(20, 90, 2), 3), dtype=np.uint8)).save(tmp_path / name)
        prompt = [user("<image>" * len(names) + f"What is {i}? " + "really " * int(rng.integers(0, 6)))]
        answers = f"It is {i}.", f"No {'idea ' * int(rng.integers(0, 4))}{i + 1}"
        records.append({"id": i, "prompt": prompt, "chosen": answers[0], "rejected": answers[1], "images": names})
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    more = [{"prompt": f"Hi {i}", "chosen": f"Yo {i}", "rejected": f"No {i}"} for i in range(10)]
    (tmp_path / "more.json").write_text("\n".join(map(json.dumps, more)))
    return tmp_path


def recipe(home, model, **flat):
    base = {
        "model.model_name_or_path": str(model),
        f"{BASIC}.dataset": f"{home}/pairs.json,{home}/more.json",
        f"{BASIC}.dataset_dir": str(home),
        f"{BASIC}.cutoff_len": CUTOFF,
        "data.dataset_param.preprocess_parameters.image_max_pixels": 8192,
        "data.dataloader_param.num_workers": 0,
        "data.dataloader_param.patch_bucket": 64,
        "training.train_iters": 10,
        "training.save": "unused",
        "training.stage": "dpo",
    }
    return from_flat(base | flat)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
TALKS = {  # prompt, chosen, rejected, more fields
    "plain": ([user("What is it?")], [assistant("A cat.")], [assistant("A dog.")], {}),
    "history": (HISTORY, [assistant("Good")], [assistant("Bad, since it is")], {}),
    "thoughts": (
        [user("a"), assistant("A", reasoning_content="old"), user("b")],
        [assistant("Good", reasoning_content="I think")],
        [assistant("Bad", reasoning_content="I think that")],
        {},
    ),
    "think blocks": (
        [user("a")],
        [assistant("<think>\nI think\n</think>\n\nGood")],
        [assistant("<think>\nbecause\n</think>\n\nBad")],
        {},
    ),
    "tools": (
        [S, user("a")],
        [assistant("", tool_calls=[CALL]), {"role": "tool", "content": "1"}, assistant("Good")],
        [assistant("Bad")],
        {"tools": TOOLS},
    ),
    "common call": (
        [user("a"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "1"}],
        [assistant("Good")],
        [assistant("Bad")],
        {"tools": TOOLS},
    ),
    "images": (
        [user([{"type": "image", "image": "1_0.png"}, {"type": "text", "text": "and"}, {"type": "image", "image": "2_1.png"}])],
        [assistant("Two.")],
        [assistant("Three.")],
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TALKS)
def test_both_sides_are_what_the_template_writes(home, folder, name):
    """By transformers: the prompt that a server gives the model, and what it is to write then."""
    prompt, chosen, rejected, more = TALKS[name]
    (home / "x.json").write_text(json.dumps([{"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}]))
    dataset = Dataset(
        Preparation.of(recipe(home, folder, **{f"{BASIC}.dataset": f"{home}/x.json", f"{BASIC}.cutoff_len": 4096})),
        vision_spec(folder),
    )
    assert len(dataset) == 1 and [dataset.source(i).rpartition(", ")[2] for i in (0, 1)] == ["chosen", "rejected"]
    theirs, prompts = AutoTokenizer.from_pretrained(folder), []
    for answer, i in zip((chosen, rejected), dataset.samples_of(0), strict=True):
        sample = dataset[i]
        given = {"tools": more.get("tools"), "tokenize": False}
        thinks = "think" in name or "thought" in name
        asked = theirs.apply_chat_template(prompt, add_generation_prompt=True, enable_thinking=thinks, **given)
        whole = theirs.apply_chat_template([*prompt, *answer], **given)
        assert whole.startswith(asked)
        pads = iter((sample.grid_thw.prod(-1) // 4).tolist())
        parts = asked.split("<|image_pad|>")
        shown = parts[0] + "".join("<|image_pad|>" * next(pads) + part for part in parts[1:])
        ids, first = theirs(shown)["input_ids"], int((sample.labels != IGNORE).nonzero()[0]) + 1
        assert sample.input_ids[:first].tolist() == ids
        rest = sample.input_ids[first:].tolist()
        assert theirs.decode(rest) == whole.removeprefix(asked)
        trained = sample.labels[first - 1 : -1]
        if name != "tools" or answer is rejected:
            assert rest == theirs(whole.removeprefix(asked))["input_ids"] == trained.tolist()
        else:  # neither the response nor the prompt of the second answer is trained
            text = theirs.decode(trained[trained != IGNORE].tolist())
            assert (
                text.count("<|im_end|>") == 2
                and "<tool_call>" in text
                and "Good" in text
                and "tool_response" not in text
            )
        prompts.append(ids)
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("template", "given"),
    [
        ("chat_template.jinja", {"enable_thinking": True}),
        ("chat_template_qwen3_6.jinja", {"preserve_thinking": True}),
        ("chat_template_qwen3_6.jinja", {"preserve_thinking": False}),
        ("chat_template_qwen3_8.jinja", {"preserve_thinking": False, "reasoning_effort": "low"}),
    ],
)
def test_what_a_recipe_gives_the_template_holds_for_both_sides(home, tmp_path, template, given):
    folder = make_model_folder(tmp_path / "model")
    shutil.copy(PUBLISHED / template, folder / "chat_template.jinja")
    prompt, chosen, rejected, _ = TALKS["thoughts"]
    (home / "x.json").write_text(json.dumps([{"prompt": prompt, "chosen": chosen, "rejected": rejected}]))
    flat = {f"{BASIC}.{name}": value for name, value in (given | {"dataset": f"{home}/x.json"}).items()}
    dataset = MicroBatches(recipe(home, folder, **flat, **{f"{BASIC}.cutoff_len": 1024}), 0, 1).dataset
    theirs, given = AutoTokenizer.from_pretrained(folder), {"tokenize": False, "enable_thinking": True} | given
    asked = theirs.apply_chat_template(prompt, add_generation_prompt=True, **given)
    assert ("old" in asked) == given.get("preserve_thinking", False)
    for answer, i in zip((chosen, rejected), dataset.samples_of(0), strict=True):
        whole, sample = theirs.apply_chat_template([*prompt, *answer], **given), dataset[i]
        assert theirs.decode(sample.input_ids.tolist()) == whole
        assert theirs.decode(sample.labels[sample.labels != IGNORE].tolist()) == whole.removeprefix(asked)


@pytest.mark.parametrize("name", TALKS)
def test_any_template_of_a_checkpoint_writes_the_same(home, folder, name):
    prompt, chosen, rejected, more = TALKS[name]
    (home / "x.json").write_text(json.dumps([{"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}]))
    flat = {f"{BASIC}.dataset": f"{home}/x.json", f"{BASIC}.cutoff_len": 4096}
    ours, foreign = (
        MicroBatches(recipe(home, folder, **flat, **{f"{BASIC}.template": name}), 0, 1).dataset
        for name in ("qwen3_5", "checkpoint")
    )
    for i in (0, 1):
        assert torch.equal(ours[i].input_ids, foreign[i].input_ids) and torch.equal(ours[i].labels, foreign[i].labels)


@pytest.mark.parametrize(
    ("answers", "more", "message"),
    [
        (("Good", "Good"), {}, "its two answers are equal as they are trained; leave the pair out"),
        (("Good", " Good\n"), {}, "its two answers are equal as they are trained"),
        (
            ("<think>x</think>Good", "Good"),
            {},
            "writes other prompts for answers with a thought .*; give each answer of a pair one",
        ),
        (("<think>x</think>Good", "Good"), {"enable_thinking": False}, "its two answers are equal as they are trained"),
        (
            ("<think>x", "Good"),
            {},
            "chosen: turn 1 begins with a think block that never ends|turn 1 begins with a think",
        ),
    ],
)
def test_pairs_that_teach_nothing_are_refused(home, folder, answers, more, message):
    (home / "x.json").write_text(json.dumps([PAIR | dict(zip(("chosen", "rejected"), answers, strict=True))]))
    flat = {f"{BASIC}.{name}": value for name, value in ({"dataset": f"{home}/x.json"} | more).items()}
    with pytest.raises(RecordError, match=rf"x\.json, record 1: .*{message}"):
        MicroBatches(recipe(home, folder, **flat), 0, 1)
    assert len(MicroBatches(recipe(home, folder), 0, 1).dataset) == 50


# -- packing ---------------------------------------------------------------------------------------


def sides_of(batch):
    """(number, chosen ids, rejected ids, labels of both) of each pair of a batch."""
    ends = batch.cu_seqlens.tolist()
    cut = lambda tensor, row: tuple(tensor[ends[row] : ends[row + 1]].tolist())  # noqa: E731
    return [
        (number, *(cut(batch.input_ids, row) for row in rows), *(cut(batch.labels, row) for row in rows))
        for number, rows in zip(batch.pair_numbers.tolist(), batch.pairs.tolist(), strict=True)
    ]


def expected(dataset, unit):
    a, b = (dataset[i] for i in dataset.samples_of(unit))
    return (a.pair, *(tuple(x.tolist()) for x in (a.input_ids, b.input_ids, a.labels, b.labels)))


def test_an_epoch_has_each_pair_once_and_whole(home, folder):
    flat = {"training.micro_batch_size": 2, "training.train_iters": None, "training.train_epochs": 2}
    ranks = [MicroBatches(recipe(home, folder, **flat), rank, 2) for rank in (0, 1)]
    dataset = ranks[0].dataset
    assert len(dataset) == dataset.units == 50 and dataset.sizes == [40, 10] and dataset.unit == "pair"
    assert dataset.lengths.tolist() == [
        sum(len(dataset[i].input_ids) for i in dataset.samples_of(u)) for u in range(50)
    ]
    assert dataset.images == 39 and dataset.videos == 0
    trained = [sum(int((dataset[i].labels != IGNORE).sum()) for i in dataset.samples_of(u)) for u in range(50)]
    assert dataset.label_tokens.tolist() == trained
    steps = ranks[0].packed_sequences.steps(1, 4)
    batches = [batch for loader in ranks for batch in islice(loader, steps)]
    found = [side for batch in batches for side in sides_of(batch)]
    assert Counter(found) == Counter(expected(dataset, unit) for unit in range(50))
    for batch in batches:
        assert batch.pairs.dtype == batch.pair_numbers.dtype == torch.int64 and batch.pairs.shape[1] == 2
        starts = batch.cu_seqlens[batch.pairs]  # both sides lie in one packed sequence
        assert torch.equal(starts[:, 0] // CUTOFF, starts[:, 1] // CUTOFF)
        assert not batch.is_pad[starts].any()
        rows = set(batch.pairs.flatten().tolist())
        others = [row for row in range(len(batch.cu_seqlens) - 1) if row not in rows]
        assert all(batch.is_pad[batch.cu_seqlens[row]] for row in others)
    report = ranks[0].report()
    assert report.startswith("data: 50 pairs of 2 files, 39 images; an epoch is ") and "sample" not in report


def test_batches_of_padding_alone_have_no_pairs(home, folder):
    flat = {f"{BASIC}.dataset": f"{home}/more.json", "training.train_iters": None, "training.train_epochs": 1}
    last = [next(iter(MicroBatches(recipe(home, folder, **flat), rank, 8))) for rank in range(8)][-1]
    assert last.pairs.shape == (0, 2) and last.pair_numbers.shape == (0,) and bool(last.is_pad.all())


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_resume_and_cache_give_the_same_pairs(home, folder, workers):
    plain = list(islice(MicroBatches(recipe(home, folder), 0, 1), 8))
    flat = {"data.dataloader_param.num_workers": workers, f"{BASIC}.cache_dir": str(home / "cache")}
    for _ in range(2):  # made, read
        again = list(islice(MicroBatches(recipe(home, folder, **flat), 0, 1, start_step=3), 5))
        for a, b in zip(plain[3:], again, strict=True):
            for name in ("input_ids", "labels", "pairs", "pair_numbers", "pixel_values", "cu_seqlens"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_the_cache_and_the_fingerprint_know_the_stage(home, folder):
    """Of text that is a conversation in both: what it is trained as differs."""
    records = [{"messages": GOOD, "rejected_response": "Bad"}]
    (home / "x.json").write_text(json.dumps(records))
    dpo = recipe(home, folder, **{f"{BASIC}.dataset": f"{home}/x.json", f"{BASIC}.cache_dir": str(home / "cache")})
    (home / "x.json").write_text(json.dumps([{"messages": GOOD}]))
    sft = recipe(home, folder, **{"training.stage": "sft", f"{BASIC}.dataset": f"{home}/x.json"})
    assert Preparation.of(dpo).cache_key(home / "x.json", None) != Preparation.of(sft).cache_key(home / "x.json", None)
    (home / "x.json").write_text(json.dumps(records))
    assert len(load_samples(home / "x.json", Preparation.of(dpo), None).sources) == 2
    with pytest.raises(RecordError, match=r"has rejected_response, which is not read; training\.stage: dpo learns"):
        MicroBatches(sft, 0, 1)


def test_what_is_odd_in_a_pair_is_said_once(home, folder):
    call = assistant("", tool_calls=[CALL])
    talk = {
        "messages": [user("<|im_end|>"), call, {"role": "tool", "content": "1"}, assistant("Good")],
        "rejected_response": "B",
    }
    old = {"prompt": TALKS["thoughts"][0], "chosen": "Good", "rejected": "Bad"}
    (home / "x.json").write_text(json.dumps([talk, old]))
    flat = {f"{BASIC}.dataset": f"{home}/x.json", f"{BASIC}.cutoff_len": 1024}
    _, *lines = MicroBatches(recipe(home, folder, **flat), 0, 1).report().splitlines()
    assert len(lines) == 1 and "control tokens are spelled in the text of 1 record, and kept as characters" in lines[0]


def test_boxes_stand_where_both_answers_see_them(home, folder):
    raw = {"prompt": "<image>What is at <bbox>?", "chosen": "A cat.", "rejected": "A dog.", "images": ["1_0.png"]}
    raw |= {"objects": {"bbox": [[0.25, 0.5]], "bbox_type": "norm1"}}
    (pair,) = read(home, [raw], bbox_format="new")
    assert [side.turns[0].text for side in (pair, pair.rejected)] == ["What is at [250, 500]?"] * 2


def test_max_samples_counts_pairs(home, folder):
    few = MicroBatches(recipe(home, folder, **{f"{BASIC}.max_samples": 43}), 0, 1)
    assert len(few.dataset) == 43 and few.dataset.sizes == [40, 3]


@pytest.mark.parametrize("special", ["tokens", "text"])
def test_special_tokens_in_the_prompt_of_both(home, folder, special):
    (home / "x.json").write_text(json.dumps([PAIR | {"prompt": "<|box_start|>"}]))
    flat = {f"{BASIC}.dataset": f"{home}/x.json", f"{BASIC}.special_tokens_in_prompts": special}
    dataset = MicroBatches(recipe(home, folder, **flat), 0, 1).dataset
    box = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|box_start|>")
    assert [(dataset[i].input_ids == box).sum() for i in (0, 1)] == [int(special == "tokens")] * 2


def test_an_image_of_both_answers_is_decoded_once(home, folder, monkeypatch):
    decoded, decode = Counter(), ImageProcessor.patches
    loader = MicroBatches(recipe(home, folder, **{"data.dataloader_param.shuffle": False}), 0, 1)
    batches = list(islice(loader, loader.sequences_per_epoch))
    monkeypatch.setattr(ImageProcessor, "patches", lambda self, path: decoded.update([path.name]) or decode(self, path))
    for a, b in zip(batches, islice(loader, loader.sequences_per_epoch), strict=True):
        assert torch.equal(a.pixel_values, b.pixel_values) and torch.equal(a.grid_thw, b.grid_thw)
    assert len(decoded) == 39 and set(decoded.values()) == {1}
    assert len(loader.dataset[4].pixel_values) == len(loader.dataset[5].pixel_values) > 0  # a side by itself


def test_weights_repeat_pairs(home, folder):
    entries = [{"file": f"{home}/pairs.json", "weight": 0.5}, {"file": f"{home}/more.json", "weight": 2}]
    loader = MicroBatches(recipe(home, folder, **{f"{BASIC}.dataset": entries}), 0, 1)
    assert "data: by weight an epoch is 40 pairs: 20 of " in loader.report()
    batches = islice(loader, loader.sequences_per_epoch)
    numbers = Counter(number for batch in batches for number in batch.pair_numbers.tolist())
    assert {numbers[n] for n in range(40, 50)} == {2} and sum(numbers[n] for n in range(40)) == 20


def test_a_pair_that_is_too_long_is_dropped_whole(home, folder):
    """Though each of its sides would fit."""
    loader = MicroBatches(recipe(home, folder), 0, 1)
    longest = int(loader.dataset.sample_lengths.max())
    assert longest < int(loader.dataset.lengths.max()) - 10
    cut = int(loader.dataset.lengths.max()) - 1
    count = int((loader.dataset.lengths > cut).sum())
    with pytest.raises(
        RecordError,
        match=r"record \d+ \(id \d+\): \d+ tokens of both answers, each with the prompt, more than "
        r".*cutoff_len = \d+.*; truncation: drop leaves such records out$",
    ):
        MicroBatches(recipe(home, folder, **{f"{BASIC}.cutoff_len": cut}), 0, 1)
    left = MicroBatches(recipe(home, folder, **{f"{BASIC}.cutoff_len": cut, f"{BASIC}.truncation": "drop"}), 0, 1)
    assert len(left.dataset) == 50 - count and left.dataset.units == 50 and len(left.dataset.skipped) == count
    whole = {expected(loader.dataset, unit)[0]: expected(loader.dataset, unit) for unit in range(50)}
    ours = [expected(left.dataset, unit) for unit in range(len(left.dataset))]
    assert all(whole[pair[0]] == pair for pair in ours) and len({pair[0] for pair in ours}) == 50 - count
    gone = int(np.flatnonzero(loader.dataset.lengths > cut)[0])
    assert left.dataset.images == 39 - gone % 3 if count == 1 else left.dataset.images < 39
    assert f"skipped {count} of 50 records: {count} longer than cutoff_len; first: " in left.report()


def test_no_pair_is_ever_half(home, folder):
    """A record that cannot be used, or an image that breaks once it is measured, takes both."""
    records = json.loads((home / "pairs.json").read_text())
    records[3]["rejected"] = "<think>"
    records[4]["rejected"] = records[4]["chosen"]
    (home / "pairs.json").write_text(json.dumps(records))
    s = recipe(home, folder, **{f"{BASIC}.on_bad_record": "skip", "data.dataloader_param.shuffle": False})
    loader = MicroBatches(s, 0, 1)
    assert len(loader.dataset) == 48 and "skipped 2 of 50 records: " in loader.report()
    whole = [sides_of(batch) for batch in islice(loader, loader.sequences_per_epoch)]
    (home / "8_0.png").write_bytes(b"broken")
    batches = list(islice(loader, loader.sequences_per_epoch))
    broken = [sides_of(batch) for batch in batches]
    number = next(unit for unit in range(48) if "(id 8)" in loader.dataset.source(2 * unit))
    assert [[pair for pair in pairs if pair[0] != number] for pairs in whole] == broken != whole
    (bad,) = [batch.bad_records for batch in batches if batch.bad_records]
    assert len(bad) == 1 and "record 9 (id 8), chosen: " in bad[0]


def test_the_validation_set_has_pairs_too(home, folder):
    held_out = {"data.val_dataset_param.basic_parameters.dataset": f"{home}/held.json", "training.val_interval": 1}
    lines = (home / "more.json").read_text().splitlines()
    new = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}
    half = json.loads(lines[0]) | {"rejected": "Nothing"}  # its chosen side is trained, not the pair
    (home / "held.json").write_text("\n".join([json.dumps(new), lines[3], json.dumps(half)]))
    s = recipe(home, folder, **held_out)
    validation = ValidationSet(s.validation, 0, 1, training_data=s.data.dataset_param)
    found = sorted(pair for batch in validation for pair in sides_of(batch))
    assert found == [expected(validation.dataset, unit) for unit in range(3)]
    assert [number for number, *_ in found] == [0, 1, 2]
    assert validation.also_trained(MicroBatches(s, 0, 1).dataset) == [f"{home}/held.json, record 2"]


# -- what people see -------------------------------------------------------------------------------


def test_show_prints_both_sides(home, folder):
    s = recipe(home, folder)
    _, *shown = show(s, 2, colour=False)
    assert [text.partition(": ")[0].rpartition("json, ")[2] for text in shown] == [
        "record 1 (id 0), chosen", "record 1 (id 0), rejected", "record 2 (id 1), chosen", "record 2 (id 1), rejected",
    ]  # fmt: skip
    assert (
        shown[0].endswith("</think>\n\n[[It is 0.<|im_end|>\n]]") and "[[No idea" in shown[1] + shown[3] + "[[No idea"
    )
    assert shown[2].count("[[") == 1 and "1 image" in shown[2] and "1 image" in shown[3]
    tokens = int(MicroBatches(s, 0, 1).dataset.lengths[0])
    short = recipe(home, folder, **{f"{BASIC}.cutoff_len": tokens - 1})
    with pytest.raises(
        RecordError, match=r"of the 1 pair shown, 1 is longer than .*; truncation: drop leaves such records out$"
    ):
        list(show(short, 1, colour=False))
    dropping = recipe(home, folder, **{f"{BASIC}.cutoff_len": tokens - 1, f"{BASIC}.truncation": "drop"})
    _, chosen, _ = show(dropping, 1, colour=False)
    assert f", {tokens} with the other answer, MORE THAN cutoff_len {tokens - 1}, left out, " in chosen


def test_lengths_are_those_of_pairs(home, folder):
    s = recipe(home, folder)
    report, of_pairs = lengths_report(s), MicroBatches(s, 0, 1).dataset.lengths
    assert "50 records, 50 pairs\ntokens per pair, both answers with the prompt: p50 " in report
    assert f"longest {of_pairs.max():,}; {of_pairs.sum():,} in all" in report


def test_the_lengths_of_any_file_of_pairs(home, folder, capsys):
    command = ["lengths", "--data", str(home / "pairs.json"), "--tokenizer", str(folder)]
    assert main([*command, "--stage", "dpo"]) == 0
    assert "pairs.json: 40 records, 40 pairs" in capsys.readouterr().out
    (home / "named.json").write_text(json.dumps([{"prompt": "b", "good": "Good", "bad": "Bad"}]))
    named = f"[{{file: {home}/named.json, attr: {{chosen: good, rejected: bad}}}}]"
    assert main(["lengths", "--data", named, *command[3:], "--stage", "dpo"]) == 0
    assert "named.json: 1 record, 1 pair" in capsys.readouterr().out
    assert main(["lengths", "--data", named, *command[3:]]) == 1
    assert "attr.chosen is read with training.stage: dpo alone" in capsys.readouterr().err
    assert main(command) == 1
    assert "has chosen, which is not read; training.stage: dpo learns from pref" in capsys.readouterr().err


def test_the_page_of_a_run_shows_both_sides(home, folder):
    batches = MicroBatches(recipe(home, folder), 0, 1)
    shown = first_samples(batches)
    assert (
        len(shown) == 6 and [s.title.partition(":")[0].rpartition(", ")[2] for s in shown] == ["chosen", "rejected"] * 3
    )
    assert all(s.text.count("\x02") == 1 for s in shown)
    assert [len(a.images) for a in shown[::2]] == [len(b.images) for b in shown[1::2]]
    assert [title for title, _ in lengths({"lengths": {"counts": [1], "edges": [0, 1], "unit": "pair"}})] == [
        "lengths of the pairs"
    ]
