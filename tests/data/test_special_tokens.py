"""Special tokens spelled in records, compared with transformers on the whole text."""

import json
import re
import shutil

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mistakes import BASIC, DATA, SHOW, place, run, whole
from test_template import record
from tokenizer_fixture import make_model_folder, make_tokenizer
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwen35.config.load import load_settings
from qwen35.data import MicroBatches
from qwen35.data.collator import prompt_batch, vision_spec
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.preparation import Preparation
from qwen35.data.preview import BRACKETS, marked
from qwen35.data.record import RecordError, ToolCall
from qwen35.data.style import Style
from qwen35.data.template import Piece, prompt_pieces, render, training_pieces
from qwen35.data.tokenizer import CONTROL_TOKENS, ChatTokenizer
from qwen35.errors import SettingError
from qwen35.inference import generate
from qwen35.inference.load_model import find_model, prepare

__all__ = ["place", "whole"]  # fixtures

MARKUP = "<|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|>".split()
OWN = [  # as users add them
    AddedToken("<|sep|>", special=True, normalized=False),
    AddedToken("<|loc_1|>", special=True, normalized=False),
    AddedToken("<|loc_2|>", special=True, normalized=False),
    AddedToken("[A]", special=True, normalized=False),
    AddedToken("[A]1", special=True, normalized=False),  # begins with another
    AddedToken("[É]", special=True, normalized=True),  # the normaliser composes it: E + accent is this token too
    AddedToken("[left]", special=True, normalized=False, lstrip=True),
    AddedToken("[right]", special=True, normalized=False, rstrip=True),
    AddedToken("word", special=True, normalized=False, single_word=True),
    AddedToken("[plain]", special=False, normalized=False),
    AddedToken("[plainé]", special=False, normalized=True),
]
CASES = {
    "left<|sep|>right <|loc_1|><|loc_2|>": ["<|sep|>", "<|loc_1|>", "<|loc_2|>"],
    "<|object_ref_start|>digit<|object_ref_end|><|box_start|>(1,2),(6,7)<|box_end|>": MARKUP[:4],
    "<|sep|>": ["<|sep|>"],
    "<|sep|>a": ["<|sep|>"],
    "a\n<|sep|><|sep|>": ["<|sep|>", "<|sep|>"],
    "[A]1[A][A]12": ["[A]1", "[A]", "[A]1"],
    "[E\u0301][É] é": ["[É]", "[É]"],
    "a  [left] b": ["[left]"],
    "a [right]\n\nb[right]": ["[right]", "[right]"],
    "a word, words": ["word"],
    "[plain] a[plaine\u0301]": ["[plain]", "[plainé]"],
    "<|sep |> <|sep": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_model_folder(tmp_path_factory.mktemp("model"))
    tokenizer = make_tokenizer()
    for token in OWN:  # one by one: together, those that are normalised would get the first ids
        tokenizer.add_tokens([token])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def peer(folder):
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def without(folder, names):
    """Transformers' tokenizer with some special tokens renamed, so that it splits their text."""
    held = json.loads((folder / "tokenizer.json").read_text())
    for token in held["added_tokens"]:
        if token["content"] in names:
            token["content"] = f"\ue000{token['id']}"
    other = folder / "other.json"
    other.write_text(json.dumps(held))
    return PreTrainedTokenizerFast(tokenizer_file=str(other))


@pytest.fixture(scope="module")
def peer_without_control(folder):
    return without(folder, CONTROL_TOKENS)


@pytest.fixture(scope="module")
def peer_without_special(folder):
    return without(folder, [*CONTROL_TOKENS, *MARKUP, *(token.content for token in OWN if token.special)])


# -- in answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("where", ["content", "reasoning_content", "think block", "argument", "history", "nothink"])
def test_ids_of_an_answer_equal_transformers(text, where, tokenizer, peer):
    turns = {
        "content": [("assistant", f"A {text} b")],
        "reasoning_content": [("assistant", "A", text)],
        "think block": [("assistant", f"<think>\n{text}\n</think>\n\nA")],
        "argument": [("assistant", "", None, (ToolCall("f", {"a": text, "b": [text]}),))],
        "history": [("assistant", text), ("user", "more"), ("assistant", "A")],
        "nothink": [("assistant", text)],
    }[where]
    pieces = training_pieces(
        record(("user", "Hi"), *turns), Style("qwen3_vl_nothink" if where == "nothink" else "qwen3_5")
    )
    whole = render(pieces)
    wanted = peer(whole).input_ids
    ids, trained = tokenizer.encode(pieces)
    assert ids.tolist() == wanted
    known = {token: peer.convert_tokens_to_ids(token) for token in CASES[text]}
    times = 2 if where == "argument" else 1
    if "\u0301" not in text or where != "argument":  # JSON of a list has them composed or not as it was given
        found = [token for token in ids.tolist() if token in known.values()]
        assert found == [known[token] for token in CASES[text]] * times
    assert all(trained[ids == number].all() for number in known.values())


@pytest.mark.parametrize("text", ["[left]b", "  [left]b", "[right] b", "<|sep|>\n"])
def test_a_token_that_starts_an_answer_follows_the_prompt(text, tokenizer, peer):
    """A token takes no characters of the prompt."""
    for template in ("qwen3_5", "qwen3_vl_nothink"):
        r = record(("user", "Hi"), ("assistant", text))
        prompt = render(prompt_pieces(r, Style(template), thinking=False))
        ids, trained = tokenizer.encode(training_pieces(r, Style(template)))
        before = peer(prompt).input_ids
        answer = text.strip() if template == "qwen3_5" else text
        assert ids.tolist() == before + peer(f"{answer}<|im_end|>").input_ids + peer("\n").input_ids
        assert trained.tolist() == [i >= len(before) for i in range(len(ids))]


def test_a_token_is_trained_where_its_first_character_is(tokenizer, peer):
    """That includes white space that a special token strips from its left."""
    sep, left = peer.convert_tokens_to_ids(["<|sep|>", "[left]"])
    for texts, token in (("a<|se", "p|>b"), sep), (("a ", "[left]b"), left), (("a[le", "ft]b"), left):
        pieces = [Piece(texts[0], answer=True), Piece(texts[1], trained=True, answer=True)]
        ids, trained = tokenizer.encode(pieces)
        assert ids.tolist() == peer("".join(texts)).input_ids
        assert trained.tolist() == [False, False, True] and ids[1] == token
        ids, trained = tokenizer.encode([Piece("<|im_end|>" + texts[0]), *pieces[1:]])  # and where a part is characters
        assert trained.tolist() == [False] * (len(ids) - 1) + [True] and ids[-2] == token


# -- anywhere --------------------------------------------------------------------------------------

WORDS = [
    "Hi",
    " ",
    "\n",
    "é",
    "e\u0301",
    "描述",
    "words",
    "</tool_call>",
    "[",
    "<|",
    *MARKUP,
    *(t.content for t in OWN),
]
TEXT = st.lists(st.sampled_from(WORDS), max_size=7).map("".join)
HARD_TEXT = st.lists(st.sampled_from([*WORDS, *CONTROL_TOKENS, *CONTROL_TOKENS]), max_size=7).map("".join)
quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def conversations(draw, text):
    turns = [("system", draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [("user", draw(text)), ("assistant", draw(text), *draw(st.lists(text, max_size=1)))]
        if draw(st.integers(0, 2)) == 0:
            content, *thought = turns.pop()[1:]
            calls = (ToolCall("f", draw(st.dictionaries(st.sampled_from(["a", "b"]), text))),)
            turns += [
                ("assistant", content, *(thought or [None]), calls),
                ("tool", draw(text)),
                ("assistant", draw(text)),
            ]
    return record(*turns, tools=draw(st.lists(st.fixed_dictionaries({"name": text}), max_size=1).map(tuple)))


def pieces_of(r):
    """Pieces for training, or None if a token could span the end of the prompt."""
    try:
        pieces = training_pieces(r, Style())
    except RecordError:
        return None
    joins = re.compile(r"\s*([\r\n]|\[left\])")
    return None if any(p.fresh and joins.match(p.text) for p in pieces) else pieces


@quick
@given(r=conversations(TEXT), thinking=st.booleans())
def test_random_conversations_equal_transformers(r, thinking, tokenizer, peer):
    pieces = pieces_of(r)
    assume(pieces is not None)
    assert tokenizer.encode(pieces)[0].tolist() == peer(render(pieces)).input_ids
    prompt = prompt_pieces(r, Style(), thinking)
    assert tokenizer.encode(prompt)[0].tolist() == peer(render(prompt)).input_ids


def expected(pieces, outside, inside=None):
    """Ids by the runs between control pieces; inside: the tokenizer for runs with an answer."""
    ids, run = [], []
    for piece in [*pieces, Piece("", kind="control")]:
        if piece.fresh or piece.kind == "control":
            peer = inside if inside is not None and any(p.answer for p in run) else outside
            ids += peer("".join(p.text for p in run)).input_ids
            run = []
        if piece.kind == "control":
            ids += [piece.text]
        else:
            run.append(piece)
    return ids[:-1]


@quick
@given(r=conversations(HARD_TEXT))
def test_control_tokens_stay_characters(r, tokenizer, peer, peer_without_control, peer_without_special, folder):
    pieces = pieces_of(r)
    assume(pieces is not None)
    number = peer.convert_tokens_to_ids
    wanted = [number(t) if isinstance(t, str) else t for t in expected(pieces, peer_without_control)]
    assert tokenizer.encode(pieces)[0].tolist() == wanted
    plain = ChatTokenizer(folder, "text")
    texts = expected(pieces, peer_without_special, peer_without_control)
    assert plain.encode(pieces)[0].tolist() == [number(t) if isinstance(t, str) else t for t in texts]


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_each_control_token(token, tokenizer, peer):
    assert peer.convert_tokens_to_ids(token) in peer(token).input_ids  # the published tokenizer has it
    turns = (
        ("user", token),
        ("assistant", f"a{token}<|sep|>", token),
        ("user", f"<|sep|>{token}"),
        ("assistant", token, token),
    )
    r = record(*turns)
    pieces, spelled = training_pieces(r, Style()), {}
    ids, _ = tokenizer.encode(pieces, (), spelled)
    own = [p.text for p in pieces if p.kind == "control"]
    assert ids.tolist().count(peer.convert_tokens_to_ids(token)) == own.count(token)
    assert ids.tolist().count(peer.convert_tokens_to_ids("<|sep|>")) == 2
    assert tokenizer.decode(ids.tolist()) == render(pieces)
    assert spelled == {"control": {token}, "token": {"<|sep|>"}}


def test_end_tokens_named_by_the_folder_are_control_tokens(folder, tmp_path):
    names = json.loads((folder / "tokenizer_config.json").read_text())
    for file in ("tokenizer.json", "config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    for key in ("pad_token", "eos_token"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {key: {"content": "<|sep|>"}}))
        spelled = {}
        ids, _ = ChatTokenizer(tmp_path).encode([Piece("a<|sep|>[A]", answer=True)], (), spelled)
        assert len(ids) > 4 and spelled == {"control": {"<|sep|>"}, "token": {"[A]"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"eos_token": 3}))
    with pytest.raises(SettingError, match=r"tokenizer_config\.json: eos_token: 3 is not a token$"):
        ChatTokenizer(tmp_path)


@pytest.mark.parametrize(("key", "text"), [("split_special_tokens", "<|im_end|>"), ("add_prefix_space", "Hi")])
def test_a_tokenizer_that_splits_text_otherwise_is_refused(key, text, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model/tokenizer_config.json"
    names, ids = json.loads(file.read_text()), []
    for value in (False, True):
        file.write_text(json.dumps(names | {key: value}))
        theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
        ids.append(theirs(text).input_ids)
        if not value:
            ChatTokenizer(tmp_path / "model")
    # only a class of the model's own, as 5.23 has it, puts a space first
    assert len(ids[1]) > len(ids[0]) or (key, type(theirs).__name__) == ("add_prefix_space", "TokenizersBackend")
    with pytest.raises(SettingError, match=rf"tokenizer_config\.json: {key}: .*; set it to false$"):
        ChatTokenizer(tmp_path / "model")


@pytest.mark.parametrize("setting", ["tokens", "text"])
def test_template_tags_are_tokens_even_if_marked_special(setting, folder, tmp_path, peer):
    for file in ("tokenizer.json", "config.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    held = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in held["added_tokens"]:
        token["special"] |= re.fullmatch(r"</?(think|tool_call|tool_response)>", token["content"]) is not None
    (tmp_path / "tokenizer.json").write_text(json.dumps(held))
    calls = (ToolCall("f", {"a": "<|box_start|>"}),)
    r = record(("user", "Hi"), ("assistant", "", "why", calls), ("tool", "<|im_end|>"), ("assistant", "A"))
    pieces = training_pieces(r, Style())
    ids = ChatTokenizer(tmp_path, setting).encode(pieces)[0].tolist()
    assert ids == ChatTokenizer(folder, setting).encode(pieces)[0].tolist()
    for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"):
        assert ids.count(peer.convert_tokens_to_ids(tag)) == render(pieces).count(tag) > 0


def decoder(folder, **changed):
    """An added_tokens_decoder as transformers writes it, with other flags for <|sep|>."""
    held = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    entries = {str(token.pop("id")): token for token in held}
    return {i: token | (changed if token["content"] == "<|sep|>" else {}) for i, token in entries.items()}


@pytest.mark.parametrize("changed", [{"eos_token": []}, {"added_tokens_decoder": {"7": {"content": ["a"]}}}])
def test_token_names_that_are_no_text_are_refused(changed, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(SettingError, match=r"does not agree with tokenizer_config\.json"):
        ChatTokenizer(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("<|new|>", lambda folder: {"added_tokens_decoder": decoder(folder) | {"999": {"content": "<|new|>"}}}),
        ("<|new|>", lambda _: {"additional_special_tokens": ["<|im_start|>", "<|new|>"]}),
        ("<|new|>", lambda _: {"extra_special_tokens": {"new_token": "<|new|>"}}),
        ("<|new|>", lambda _: {"extra_special_tokens": ["<|new|>"]}),
        ("<|new|>", lambda _: {"bos_token": "<|new|>"}),
        ("<|new|>", lambda _: {"my_own_token": "<|new|>"}),
        ("<|sep|>", lambda folder: {"added_tokens_decoder": decoder(folder, content="<|im_end|>")}),
        ("<|sep|>", lambda folder: {"added_tokens_decoder": decoder(folder, lstrip=True)}),
        ("<|sep|>", lambda folder: {"added_tokens_decoder": decoder(folder, single_word=True)}),
        ("</think>", lambda _: {"added_tokens_decoder": {}}),
    ],
    ids=[
        "decoder",
        "additional",
        "extra",
        "extra list",
        "bos",
        "own",
        "missing",
        "lstrip",
        "single_word",
        "none listed",
    ],
)
def test_added_tokens_that_transformers_treats_differently_are_refused(name, change, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model/tokenizer_config.json"
    names, text = json.loads(file.read_text()), f"a {name}b <|box_start|> <think> c"
    known = {"added_tokens_decoder": decoder(folder), "additional_special_tokens": MARKUP, "unk_token": None}
    for more in ({}, known):
        file.write_text(json.dumps(names | more))
        ids = ChatTokenizer(tmp_path / "model").encode([Piece(text)])[0].tolist()
        assert ids == AutoTokenizer.from_pretrained(tmp_path / "model")(text).input_ids
    file.write_text(json.dumps(names | change(folder)))
    peer = AutoTokenizer.from_pretrained(tmp_path / "model")
    lacks = (
        name not in file.read_text()
    )  # tokenizer.json has it: only a class of the model's own, as 5.23 has it, loses it
    assert (peer(text).input_ids != ids) is (not lacks or type(peer).__name__ == "Qwen3_5Tokenizer")
    message = (
        rf"does not agree with tokenizer_config\.json, .* the added tokens {re.escape(name)}[;,].* save the tokenizer"
    )
    with pytest.raises(SettingError, match=message):
        ChatTokenizer(tmp_path / "model")


SPLITS = {"behavior": "Isolated", "invert": False, "type": "Split"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
STEPS = {
    "normalizer": {"normalizer": {"type": "Lowercase"}},
    "no normalizer": {"normalizer": None},
    "no pre_tokenizer": {"pre_tokenizer": None},
    "pre_tokenizer": {"pre_tokenizer": BYTES | {"add_prefix_space": True, "use_regex": True}},
    "Qwen2's pattern": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [SPLITS | {"pattern": {"Regex": QWEN2}}, BYTES],
        }
    },
}


@pytest.mark.parametrize("case", STEPS)
def test_steps_that_transformers_replaces_are_replaced(case, folder, tmp_path):
    """Only a class of the model's own, as 5.23 has it, replaces them."""
    shutil.copytree(folder, tmp_path / "model")
    file, text = tmp_path / "model/tokenizer.json", "It's E\u0301 in  words, \u0939\u093f\u0928\u094d\u0926\u0940"
    held = json.loads(file.read_text())
    held["model"]["vocab"]["\xb9\xe0"] = 5000  # the last byte of a Devanagari letter and the first of its mark
    held["model"]["merges"].append(["\xb9", "\xe0"])
    file.write_text(json.dumps(held))
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")(text).input_ids
    ours = ChatTokenizer(tmp_path / "model")
    assert (ours.encode([Piece(text)])[0].tolist(), ours.notes) == (ids, [])
    file.write_text(json.dumps(held | STEPS[case]))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert type(theirs).__name__ != "Qwen3_5Tokenizer" or theirs(text).input_ids == ids
    assert Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids != ids
    ours, (name,) = ChatTokenizer(tmp_path / "model"), STEPS[case]
    assert ours.encode([Piece(text)])[0].tolist() == ids
    assert ours.notes == [f"{file}: its {name} is not Qwen3.5's, which is used instead, as in transformers"]


def test_random_tokens_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model/tokenizer.json"
    held = json.loads(file.read_text())
    held["model"]["dropout"] = 0.5
    file.write_text(json.dumps(held))
    theirs = Tokenizer.from_file(str(file))
    assert len({tuple(theirs.encode("What is in the picture?").ids) for _ in range(20)}) > 1
    with pytest.raises(SettingError, match=r"tokenizer\.json: its model has dropout, .*; set it to null$"):
        ChatTokenizer(tmp_path / "model")


OLDER = {
    "special": ("special_tokens_map.json", {"sep_token": "<|new|>"}),
    "additional": ("special_tokens_map.json", {"additional_special_tokens": ["<|new|>"]}),
    "added": ("added_tokens.json", {"<|new|>": 999}),
}


@pytest.mark.parametrize("case", OLDER)
def test_files_of_older_releases_count_as_in_transformers(case, folder, tmp_path):
    """They do unless tokenizer_config.json lists the added tokens."""
    shutil.copytree(folder, tmp_path / "model")
    file, content = OLDER[case]
    (tmp_path / "model" / file).write_text(json.dumps(content))
    config = tmp_path / "model/tokenizer_config.json"
    names, text = json.loads(config.read_text()), "a <|new|>b"
    config.write_text(json.dumps(names | {"added_tokens_decoder": decoder(folder)}))
    ids = ChatTokenizer(tmp_path / "model").encode([Piece(text)])[0].tolist()
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "model")(text).input_ids
    config.write_text(json.dumps(names))
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(text).input_ids != ids
    message = rf"does not agree with tokenizer_config\.json and {re.escape(file)}, .* added tokens <\|new\|>; save the"
    with pytest.raises(SettingError, match=message):
        ChatTokenizer(tmp_path / "model")


def test_the_end_token_of_an_older_file_is_a_control_token(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|sep|>"}}))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<|sep|>"
    assert "<|sep|>" in ChatTokenizer(tmp_path / "model").control_names


# -- what is said of them --------------------------------------------------------------------------

RECORDS = [
    {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}
    for user, answer in (
        ("Hi", "Yo"),
        ("Where is <|box_start|>(1,2)<|box_end|>?", "<|quad_start|>"),
        ("Hi", "a<|im_end|>"),
        ("What is <|im_end|> or <|vision_pad|> or <|box_start|>?", "Yo"),
    )
]
CONTROL = (
    "control tokens are spelled in the text of 2 records, and kept as characters "
    "(remove any that a chat template has left there): <|im_end|>, <|vision_pad|>; "
    "first: data/a.json, record 3"
)
AS_TOKENS = (
    "special tokens are spelled in the text of 2 records, and each becomes one token: <|box_end|>, <|box_start|>, "
    "<|quad_start|>; first: data/a.json, record 2"
)
AS_TEXT = (
    "special tokens are spelled by user, system or tools in 2 records, and kept as characters "
    "(special_tokens_in_prompts: text): <|box_end|>, <|box_start|>; first: data/a.json, record 2"
)
ANSWERS = (
    "special tokens are spelled in the text of 1 record, and each becomes one token: <|quad_start|>; "
    "first: data/a.json, record 2"
)
TEXT_SETTING = f"{BASIC}.special_tokens_in_prompts=text"


@pytest.mark.parametrize(("more", "lines"), [([], [CONTROL, AS_TOKENS]), ([TEXT_SETTING], [CONTROL, AS_TEXT, ANSWERS])])
def test_a_run_reports_special_tokens(more, lines, place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "data/a.json").write_text(json.dumps(RECORDS))
    for cached in ([], [f"{BASIC}.cache_dir=cache"], [f"{BASIC}.cache_dir=cache"]):  # the last time from the cache
        report = MicroBatches(load_settings("r.yaml", [*more, *cached]), 0, 1).report().splitlines()
        assert [line for line in report if "spelled" in line] == [f"data: {line}" for line in lines]


@pytest.mark.parametrize("setting", ["tokens", "text"])
def test_generate_uses_the_setting_of_training(setting, place, monkeypatch):
    monkeypatch.chdir(place)
    recipe = yaml.safe_load((place / "r.yaml").read_text())
    recipe["data"]["dataset_param"]["basic_parameters"]["special_tokens_in_prompts"] = setting
    (place / "run").mkdir()
    shutil.move(place / "dcp/release", place / "run/release")
    for file in (
        "r.yaml",
        "run/config.yaml",
    ):  # by a recipe that is named, and by that of the run whose checkpoint it is
        (place / file).write_text(yaml.safe_dump(recipe))
    text = "Where is <|box_start|>(1,2)<|box_end|>?"
    training = Preparation.of(load_settings("r.yaml", []))
    for words in (["--model", "hf", "--recipe", "r.yaml"], ["--model", "run"]):
        args = generate.parse([*words, "--prompt", text])
        source = find_model(args.model)
        batch = prompt_batch(generate.question(args), prepare(args, source), vision_spec(source.config), thinking=False)
        ((_, sample),) = training.tokenise(record(("user", text), ("assistant", "A")))
        prompt = batch.input_ids.tolist()
        assert sample.ids[: len(prompt)].tolist() == prompt
        box = training.tokenizer.encode([Piece("<|box_start|>", answer=True)])[0].item()
        assert (box in prompt) == (setting == "tokens")


def test_the_cache_depends_on_the_setting(place, monkeypatch):
    monkeypatch.chdir(place)
    keys = set()
    for more in ([], [TEXT_SETTING], [f"{BASIC}.special_tokens_in_prompts=tokens"]):
        keys.add(Preparation.of(load_settings("r.yaml", more)).cache_key(place / "data/a.json", None))
    assert len(keys) == 2
    names = json.loads((place / "hf/tokenizer_config.json").read_text())
    (place / "hf/tokenizer_config.json").write_text(json.dumps(names | {"eos_token": "<|box_end|>"}))
    assert Preparation.of(load_settings("r.yaml", [])).cache_key(place / "data/a.json", None) not in keys


def test_show_marks_text_that_spells_a_special_token(folder, peer_without_special):
    r = record(("user", "é<|box_start|> <|im_end|>"), ("assistant", "é<|box_start|>描 <|im_end|><|sep|> <|sep"))
    box, end = (
        "¦".join(
            text[start:stop] for start, stop in peer_without_special(text, return_offsets_mapping=True).offset_mapping
        )
        for text in ("<|box_start|>", " <|im_end|>")
    )
    assert box.count("¦") > 2 and end.count("¦") > 2
    for setting, asked in ("tokens", "<|box_start|>"), ("text", box):
        tokenizer = ChatTokenizer(folder, setting)
        ids, trained = (part.tolist() for part in tokenizer.encode(training_pieces(r, Style("qwen3_vl_nothink"))))
        assert marked(tokenizer, ids, trained, BRACKETS) == (
            f"<|im_start|>user\né{asked}{end}<|im_end|>\n"
            f"<|im_start|>assistant\n[[é<|box_start|>描{end}<|sep|> <|sep<|im_end|>\n]]"
        )


def test_show_reports_special_tokens(place):
    (place / "data/a.json").write_text(json.dumps(RECORDS))
    done = run(place, *SHOW, "--samples", "4", TEXT_SETTING)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    at = lines.index("--- of the records shown:")
    assert lines[at + 1 :] == [CONTROL, AS_TEXT, ANSWERS, "these characters are shown with ¦ between their tokens"]
    (place / "data/a.json").write_text(json.dumps(RECORDS[:2]))
    done = run(place, *SHOW)
    assert done.code == 0 and done.out.endswith(
        f"--- of the records shown:\n{AS_TOKENS.replace('2 records', '1 record')}\n"
    )
    done = run(place, *SHOW, "--samples", "1")
    assert done.code == 0 and "of the records shown" not in done.out


@pytest.mark.parametrize("workers", ["1", "2"])
def test_make_data_reports_special_tokens(workers, place):
    turns = [{"from": "human", "value": "What is <|im_end|> or <|box_start|>?"}, {"from": "gpt", "value": "Yo"}]
    (place / "data/a.json").write_text(json.dumps([{"conversations": turns}] * 600))
    done = run(place, *DATA, "--tokenizer", "hf", "--workers", workers)
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if "spelled" in line]
    first = "; first: data/a.json, record 1"
    assert lines == [
        (
            "control tokens are spelled in the text of 600 records, and kept as characters (remove any that a chat "
            f"template has left there): <|im_end|>{first}"
        ),
        f"special tokens are spelled in the text of 600 records, and each becomes one token: <|box_start|>{first}",
    ]
    assert "spelled" not in run(place, *DATA, "--workers", workers).out  # without a tokenizer nobody knows


def test_counts_of_files_are_merged():
    one, other, whole = DataWarnings(), DataWarnings(), DataWarnings()
    one.count_spelled({"control": {f"<{i}>" for i in range(7)}}, "a, record 1")
    other.count_spelled({"control": {"<0>"}, "token": {"<x>"}}, "b, record 1")
    other.count_spelled({"token": {"<y\x1b>"}}, "b, record 2")
    for part in (DataWarnings(), one, other):
        whole.update(part)
    assert whole.lines() == [
        (
            "control tokens are spelled in the text of 2 records, and kept as characters (remove any that a chat "
            "template has left there): <0>, <1>, <2>, <3>, <4> and 2 more; first: a, record 1"
        ),
        r"special tokens are spelled in the text of 2 records, and each becomes one token: <x>, <y\x1b>; first: b, record 1",
    ]
    assert DataWarnings().lines() == []
