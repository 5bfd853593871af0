"""Prompts and right answers of evaluation and validation, against transformers' chat template."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import save_checkpoint
from PIL import Image
from transformers import AutoTokenizer

from qwen35.config.load import from_flat, to_yaml
from qwen35.config.schema import Settings
from qwen35.data.tokenized import silent
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.errors import SettingError
from qwen35.inference import evaluate, predict
from qwen35.inference.load_model import find_model, load_model
from qwen35.inference.sampling import Sampling
from qwen35.tools import tiny
from qwen35.training import validation
from qwen35.training.validation import Validation

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


THOUGHT = "<think>\nwhy\n</think>\n\n"
CALLS = [call("f", b=[1, "é"], a="two\nlines"), call("g")]
ANSWERS = {  # name -> the last turn, and whether it has a thought
    "plain": ({"content": " 7 "}, False),
    "thought in the content": ({"content": f"{THOUGHT}7"}, True),
    "thought beside the content": ({"content": "7", "reasoning_content": "why"}, True),
    "empty thought": ({"content": "<think>\n\n</think>\n\n7"}, False),
    "call": ({"content": "", "tool_calls": CALLS}, False),
    "text and call": ({"content": "I look.", "tool_calls": CALLS[:1]}, False),
    "thought and call": ({"content": f"{THOUGHT}", "tool_calls": CALLS}, True),
    "thought, text and call": ({"content": "I look.", "reasoning_content": "why", "tool_calls": CALLS}, True),
    "letters in two parts": ({"content": "Zu\u0308rich"}, False),  # the tokenizer puts them together
    "empty": ({"content": ""}, False),
}
# A thought before the last answer and after the last question, so that the template keeps it.
LOOKED = [
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": CALLS[1:]},
    {"role": "tool", "content": "9"},
]
ASKED = {name: [{"role": "user", "content": f"{name}?"}] for name in ANSWERS}
CONVERSATIONS = {name: [*ASKED[name], {"role": "assistant"} | turn] for name, (turn, _) in ANSWERS.items()}
CONVERSATIONS["after a thought"] = [*LOOKED, {"role": "assistant", "content": "It is 9."}]
HAS_THOUGHT = {name: has for name, (_, has) in ANSWERS.items()} | {"after a thought": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("evaluate")
    tiny.make_model(place / "hf", seed=3)
    write_records(place / "records.json", CONVERSATIONS.values())
    return place


def write_records(path: Path, conversations) -> None:
    path.write_text(json.dumps([{"messages": turns, "tools": TOOLS} for turns in conversations]))


def by_template(place: Path, turns: list[dict], thinking: bool, prompt: bool) -> str:
    """transformers' rendering; a call's arguments come as an object."""
    tokenizer = AutoTokenizer.from_pretrained(place / "hf")
    options = {"tools": TOOLS, "tokenize": False, "add_generation_prompt": prompt, "enable_thinking": thinking}
    return tokenizer.apply_chat_template(turns, **options)


@pytest.fixture(scope="module")
def expected(place) -> dict[str, tuple[str, str]]:
    """Of each record the prompt, and what the template writes after it, to the end of the turn."""
    found = {}
    for name, turns in CONVERSATIONS.items():
        prompt = by_template(place, turns[:-1], HAS_THOUGHT[name], prompt=True)
        whole = by_template(place, turns, HAS_THOUGHT[name], prompt=False)
        assert whole.startswith(prompt) and whole.endswith("<|im_end|>\n"), name
        found[name] = prompt, whole[len(prompt) :].removesuffix("<|im_end|>\n")
    return found


@pytest.fixture
def asked(place, monkeypatch) -> Callable[..., list[str]]:
    """Make the model give these answers; -> the prompts so far."""
    prompts: list[str] = []
    tokenizer = ChatTokenizer(place / "hf")

    def script(given: list[str], limits: list[int] | None = None, ways: list[Sampling] | None = None) -> list[str]:
        left = iter(given)

        def generate(_, some, limit, __, sampling):
            prompts.extend(tokenizer.decode(prompt.input_ids.tolist()) for prompt in some)
            texts = [next(left) for _ in some]
            if limits is not None:
                limits.append(limit)
            if ways is not None:
                ways.append(sampling)
            return [tokenizer.encode_text(text) for text in texts]

        monkeypatch.setattr(predict, "generate", generate)
        return prompts

    return script


def run(place: Path, *arguments: str, model: str = "hf") -> int:
    return evaluate.main(["--model", str(place / model), "--data", str(place / "records.json"), *arguments])


@pytest.mark.parametrize("batch", ["1", "4", "64"])
def test_the_templates_own_answer_is_right(place, expected, asked, capsys, batch):
    prompts = asked([answer for _, answer in expected.values()])
    assert run(place, "--batch", batch, "--show") == 0
    assert prompts == [prompt for prompt, _ in expected.values()]
    out, err = capsys.readouterr()
    total = len(CONVERSATIONS)
    assert out == f"held-out accuracy 1.000 ({total}/{total})\n"
    where = "an open thought where the record's answer has one, else an empty one"
    assert err.endswith(f"asked with template qwen3_5, {where}; greedy\n")


WRONG = {
    "plain": ["8", "", "7 7", "<tool_call>\n<function=g>\n</function>\n</tool_call>"],
    "thought in the content": ["7", "why 7", "why\n</think>\n\n8", "</think>"],  # the first: a thought that never ends
    "call": ["", "I look."],
    "text and call": ["I look.", "I look.\n\n<tool_call>\n<function=f>\n</function>\n</tool_call>"],
    "thought and call": ["", "why\n</think>\n\n"],
    "empty": ["<tool_call>\n<function=g>\n</function>\n</tool_call>"],
}


@pytest.mark.parametrize(("name", "given"), [(n, g) for n, some in WRONG.items() for g in some])
def test_every_other_answer_is_wrong(place, asked, capsys, tmp_path, name, given):
    write_records(tmp_path / "records.json", [CONVERSATIONS[name]])
    asked([given])
    assert evaluate.main(["--model", str(place / "hf"), "--data", str(tmp_path / "records.json")]) == 0
    assert capsys.readouterr().out == "held-out accuracy 0.000 (0/1)\n"


def test_other_order_or_values_of_arguments_are_wrong(place, expected, asked, capsys, tmp_path):
    write_records(tmp_path / "records.json", [CONVERSATIONS["call"]] * 3)
    right = expected["call"][1]
    b, a = '<parameter=b>\n[1, "é"]\n</parameter>\n', "<parameter=a>\ntwo\nlines\n</parameter>\n"
    asked([right.replace(b + a, a + b), right.replace("lines", "line"), f"why\n</think>\n\n{right}\n"])
    assert b + a in right
    assert evaluate.main(["--model", str(place / "hf"), "--data", str(tmp_path / "records.json")]) == 0
    assert capsys.readouterr().out == "held-out accuracy 0.333 (1/3)\n"


@pytest.mark.parametrize(("word", "thinking"), [("--thinking", True), ("--no_thinking", False)])
def test_thinking_options_override_the_records(place, asked, capsys, word, thinking):
    prompts = asked([""] * len(CONVERSATIONS))
    assert run(place, word) == 0
    assert prompts == [by_template(place, turns[:-1], thinking, True) for turns in CONVERSATIONS.values()]
    assert capsys.readouterr().err.endswith(f"qwen3_5, an {'open' if thinking else 'empty'} thought; greedy\n")


def write_recipe(place: Path, **basic) -> Path:
    flat = {"data.dataset_param.basic_parameters.dataset": "gone.json", "training.train_iters": 5}
    flat |= {"model.model_name_or_path": str(place / "hf"), "training.save": str(place)}
    flat |= {f"data.dataset_param.basic_parameters.{name}": value for name, value in basic.items()}
    path = place / "config.yaml"
    path.write_text(to_yaml(from_flat(flat)))
    return path


def test_an_answer_that_the_loss_mask_leaves_out_is_not_what_is_right(place, asked, capsys, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad", "loss": False}]
    good = [turns[0], {"role": "assistant", "content": "good"}]
    file = tmp_path / "masked.json"
    file.write_text(json.dumps([{"messages": m} for m in (turns, good)]))
    asked(["good"])
    assert run(place, "--data", str(file)) == 0
    printed = capsys.readouterr()
    assert printed.out == "held-out accuracy 1.000 (1/1)\n"
    what = "2 records: the loss mask leaves the last answer out"
    assert f"data: not asked: 1 of {what}; first: {file}, record 1\n" in printed.err
    file.write_text(json.dumps([{"messages": turns}] * 2))
    assert run(place, "--data", str(file)) == 1
    assert f"nothing is asked of 2 of {what}" in capsys.readouterr().err


def test_a_run_without_thoughts_is_prompted_without(place, asked, capsys, tmp_path):
    """Like its samples: the thoughts of earlier answers are dropped too."""
    recipe = write_recipe(place, enable_thinking=False)
    prompts = asked([""] * len(CONVERSATIONS) * 2)
    assert run(place, "--recipe", str(recipe)) == 0
    bare = [[{k: v for k, v in t.items() if k != "reasoning_content"} for t in c] for c in CONVERSATIONS.values()]
    assert prompts == [by_template(place, turns[:-1], False, True) for turns in bare]
    assert "hm" not in "".join(prompts)
    assert capsys.readouterr().err.endswith("template qwen3_5, an empty thought (enable_thinking: false); greedy\n")
    assert run(place, "--recipe", str(recipe), "--thinking") == 0
    assert prompts[len(CONVERSATIONS) :] == [by_template(place, turns[:-1], True, True) for turns in bare]


@pytest.mark.parametrize("hf", [False, True])
def test_a_runs_checkpoint_is_prompted_as_it_trained(place, asked, capsys, tmp_path, hf):
    save_checkpoint(tmp_path, 5, load_model(find_model(place / "hf")))
    write_recipe(place, enable_thinking=False).rename(tmp_path / "config.yaml")
    prompts = asked([""] * len(CONVERSATIONS))
    assert run(tmp_path, "--data", str(place / "records.json"), *(["--hf", str(place / "hf")] * hf), model=".") == 0
    assert not any(prompt.endswith("<think>\n") for prompt in prompts) and len(prompts) == len(CONVERSATIONS)
    assert "(enable_thinking: false); greedy" in capsys.readouterr().err


@pytest.mark.parametrize("said", [None, True])
def test_a_run_with_thoughts_is_prompted_as_its_records(place, expected, asked, said):
    recipe = write_recipe(place, enable_thinking=said)
    prompts = asked([""] * len(CONVERSATIONS))
    assert run(place, "--recipe", str(recipe)) == 0
    assert prompts == [prompt for prompt, _ in expected.values()]


def test_a_template_without_thoughts_opens_none(place, asked, capsys, tmp_path):
    recipe = write_recipe(place, template="qwen3_vl_nothink")
    write_records(tmp_path / "records.json", [])
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"{THOUGHT}7"}]
    (tmp_path / "records.json").write_text(json.dumps([{"messages": turns}]))
    prompts = asked(["7"])
    words = ["--model", str(place / "hf"), "--data", str(tmp_path / "records.json"), "--recipe", str(recipe)]
    assert evaluate.main(words) == 0
    assert prompts == ["<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"]
    assert capsys.readouterr().err.endswith("template qwen3_vl_nothink, no thoughts; greedy\n")
    assert evaluate.main([*words, "--thinking"]) == 1
    assert "qwen3_vl_nothink has no thoughts" in capsys.readouterr().err


def test_the_limit_has_room_for_the_longest_answer_and_a_thought(place, asked, tmp_path):
    tokenizer, long = ChatTokenizer(place / "hf"), "because " * 2000
    turns = [
        {"content": "7 and 8"},
        {"content": "7", "reasoning_content": long},
        {"content": f"<think>{long}</think>7"},
    ]
    turns += [CONVERSATIONS["call"][-1]]
    write_records(tmp_path / "records.json", [[*LOOKED[:1], {"role": "assistant"} | turn] for turn in turns])
    limits: list[int] = []
    asked([""] * 4, limits)
    words = ["--model", str(place / "hf"), "--data", str(tmp_path / "records.json"), "--batch", "1"]
    assert evaluate.main(words) == 0
    assert limits[0] == len(tokenizer.encode_text("7 and 8")) + predict.ROOM_TO_END
    assert min(limits[1:3]) > len(tokenizer.encode_text(long)) + 1000
    assert 40 < limits[3] < 500


PUBLISHED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}  # generation_config.json of 27B


@pytest.fixture
def says(place) -> Iterator[Callable[..., None]]:
    """Write the folder's generation_config.json."""
    path = place / "hf/generation_config.json"
    before = path.read_text()
    yield lambda **values: path.write_text(json.dumps(json.loads(before) | values)) and None
    path.write_text(before)


def test_evaluation_is_greedy_unless_sampling_is_asked_for(place, asked, says, capsys):
    says(**PUBLISHED, repetition_penalty=1.1)
    ways: list[Sampling] = []
    asked([""] * 4 * len(CONVERSATIONS), ways=ways)
    for words in ([], ["--sample", "--seed", "5"], ["--temperature", "2", "--seed", "5"]):
        assert run(place, *words) == 0
    greedy, drawn, hot = ways
    assert greedy == replace(Sampling(repetition_penalty=1.1), seed=greedy.seed)
    assert drawn == Sampling(0.6, 20, 0.95, repetition_penalty=1.1, seed=5) and hot == replace(drawn, temperature=2.0)
    err = capsys.readouterr().err
    assert "; greedy, repetition_penalty 1.1\n" in err
    assert "; temperature 0.6, top_k 20, top_p 0.95, repetition_penalty 1.1, seed 5\n" in err
    says()
    assert run(place, "--sample") == 1
    assert "hf/generation_config.json does not sample; give a --temperature" in capsys.readouterr().err


def validation_settings(place: Path) -> Settings:
    flat = {"data.dataset_param.basic_parameters.dataset": str(place / "records.json"), "training.train_iters": 5}
    flat |= {"model.model_name_or_path": str(place / "hf"), "training.save": str(place), "training.val_generate": True}
    flat |= {"data.val_dataset_param.basic_parameters.dataset": str(place / "records.json"), "training.val_interval": 1}
    return from_flat(flat).validation


def validating(settings: Settings) -> Validation:
    meshes = SimpleNamespace(data_rank=0, data_size=1)
    return Validation(settings, meshes, torch.device("cpu"), torch.float32, silent)


def test_validation_is_greedy_and_refuses_unsupported_settings_at_once(place, says):
    settings, total = validation_settings(place), len(CONVERSATIONS)
    says(**PUBLISHED, repetition_penalty=1.1)
    assert f"{total} of them answered (greedy, repetition_penalty 1.1), " in validating(settings).report()
    says(num_beams=4)
    with pytest.raises(SettingError, match=r"generation_config\.json: num_beams: 4 may change the answers"):
        validating(settings)
    validating(replace(settings, training=replace(settings.training, val_generate=False)))


def test_validation_prompts_as_it_trains(place, expected, asked, monkeypatch):
    """Tool calls too; the copy of the model and the other ranks are stubs here."""
    found = validating(validation_settings(place))
    total = len(CONVERSATIONS)
    assert f": {total} samples, {total} of them answered, " in found.report()
    prompts = asked([answer for _, answer in expected.values()])
    monkeypatch.setattr(validation, "gather_weights", lambda *_: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    model = load_model(find_model(place / "hf"))
    assert found._answers(model, lambda _: None, []) == (total, total)
    assert prompts == [prompt for prompt, _ in expected.values()]


@pytest.mark.parametrize(("rest", "is_right"), [("", True), ("\n", True), ("\n\nSince 3 and 4 are 7, it is.", False)])
@pytest.mark.parametrize("limit", [None, 1])
def test_an_answer_that_is_cut_off_is_wrong(place, monkeypatch, capsys, tmp_path, rest, is_right, limit):
    """Its first tokens may be the right answer, and the rest, which is not generated, wrong."""
    tokenizer = ChatTokenizer(place / "hf")
    given = [int(token) for token in tokenizer.encode_text(f"7{rest}", answer=True)]
    monkeypatch.setattr(predict, "generate", lambda _, __, limit, *rest: [given[:limit]])
    write_records(tmp_path / "records.json", [CONVERSATIONS["plain"]])
    options = ["--max_new_tokens", str(limit)] if limit else []
    assert evaluate.main(["--model", str(place / "hf"), "--data", str(tmp_path / "records.json"), *options]) == 0
    out, err = capsys.readouterr()
    assert out == f"held-out accuracy {float(is_right and not limit):.3f} ({int(is_right and not limit)}/1)\n"
    assert ("1 of the answers did not end within --max_new_tokens" in err) == (limit == 1 or not is_right)


def test_images_of_files_in_several_folders_need_a_folder(place, asked, capsys, tmp_path):
    """Both have images/0.png, and the second file's must not be the first's."""
    for name in ("a", "b"):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("L", (40, 40), 10 if name == "a" else 240).save(tmp_path / name / "images/0.png")
        turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": name}]
        (tmp_path / name / "t.json").write_text(json.dumps([{"messages": turns, "images": ["images/0.png"]}]))
    data = ["--model", str(place / "hf"), "--data", f"{tmp_path}/a/t.json, {tmp_path}/b/t.json"]
    asked(["a", "b"])
    assert evaluate.main(data) == 1
    assert f"lie in {tmp_path}/a and {tmp_path}/b: give --dataset_dir" in capsys.readouterr().err
    assert evaluate.main([*data, "--dataset_dir", str(tmp_path / "a")]) == 0
    for name in ("a", "b"):
        write_records(tmp_path / name / "t.json", [CONVERSATIONS["plain"]])
    asked(["7", "7"])
    assert evaluate.main(data) == 0


def test_files_that_the_run_trained_on_are_named(place, asked, capsys, tmp_path, monkeypatch):
    """An export in the folder of its run is asked as that run was, whose recipe names its data."""
    flat = {"data.dataset_param.basic_parameters.dataset": "a.json,b.json", "training.train_iters": 5}
    flat |= {"model.model_name_or_path": str(place / "hf"), "training.save": str(tmp_path / "run")}
    tiny.make_model(tmp_path / "run/hf", seed=3)
    (tmp_path / "run/config.yaml").write_text(to_yaml(from_flat(flat)))
    monkeypatch.chdir(tmp_path)
    for name in "bc":
        write_records(tmp_path / f"{name}.json", [CONVERSATIONS["plain"]])
    for data, is_told in ((f"c.json,{tmp_path}/b.json", True), ("c.json", False)):
        asked(["7"] * 2)
        assert evaluate.main(["--model", "run/hf", "--data", data]) == 0
        line = f"{tmp_path}/b.json is what the run trained on, so nothing in it was held out\n"
        assert (line in capsys.readouterr().err) == is_told
