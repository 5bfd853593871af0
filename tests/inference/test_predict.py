"""`make predict`: each answer as `make generate` gives it, in any batches and after a stop."""

import base64
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_folder import write_hf
from PIL import Image

from qwen35.config.load import from_flat, load_settings, to_yaml
from qwen35.data import RecordError
from qwen35.data.dataloader import open_dataset
from qwen35.data.tokenized import silent
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.inference import answers_file, evaluate, generate, predict
from qwen35.model import Qwen35
from qwen35.tools import tiny

ROOT = Path(__file__).parents[2]
TOKENS = 10
QUESTIONS = ["Hello", "Which digit is this?", "Which digit is this?", "描述这张图", "What?", "Why?", "Who?"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An fp32 model, so that no answer hangs on a rounding; records with and without answers."""
    place = tmp_path_factory.mktemp("predict")
    tiny.make_model(place / "bf16", seed=3)
    config = json.loads((place / "bf16/config.json").read_text())
    write_hf(
        Qwen35.from_config(config, 3, mtp=True).state_dict(), config, place / "hf", dtype_of=lambda _: torch.float32
    )
    for file in (place / "bf16").iterdir():
        if not (place / "hf" / file.name).exists() and "index" not in file.name and file.suffix != ".safetensors":
            shutil.copy(file, place / "hf")
    for i in range(2):
        pixels = torch.randint(256, (40, 40, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / f"{i}.png")
    write(place / "records.json", records(place))
    return place


def records(place: Path) -> list[dict]:
    """In the forms that training reads: two with answers, three with images, one inside."""
    asked = [{"id": i, "messages": [{"role": "user", "content": text}]} for i, text in enumerate(QUESTIONS)]
    asked[1] = {"image": "0.png", "conversations": [{"from": "human", "value": f"<image>{QUESTIONS[1]}"}]}
    inline = "data:image/png;base64," + base64.b64encode((place / "1.png").read_bytes()).decode()
    asked[2]["messages"][0]["content"] = [
        {"type": "image_url", "image_url": {"url": inline}},
        {"type": "text", "text": QUESTIONS[2]},
    ]
    asked[3] |= {"images": ["1.png"], "messages": [{"role": "user", "content": f"<image>{QUESTIONS[3]}"}]}
    asked[4]["messages"].append({"role": "assistant", "content": "7"})
    asked[5]["messages"].append({"role": "assistant", "content": "8", "reasoning_content": "since"})
    asked[6]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    return asked


def write(path: Path, asked: list) -> None:
    path.write_text(json.dumps(asked))


def options(place: Path, out: Path, *arguments: str) -> list[str]:
    words = ["--model", str(place / "hf"), "--data", str(place / "records.json"), "--out", str(out)]
    return [*words, "--max_new_tokens", str(TOKENS), *arguments]


@pytest.fixture
def ask(place, tmp_path, capsys) -> Callable[..., str]:
    """Write tmp_path/answers.jsonl; -> what is printed, on standard error if it fails."""

    def ask(*arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        assert predict.main(options(place, tmp_path / "answers.jsonl", *arguments)) == status
        printed = capsys.readouterr()
        assert not status or (printed.out == "" and printed.err.splitlines()[-1].startswith("error: "))
        return printed.err if status else printed.out

    return ask


@pytest.fixture(scope="module")
def whole(place) -> bytes:
    """The answers of a run that nobody interrupted, two at once."""
    assert predict.main(options(place, place / "whole.jsonl", "--batch", "2")) == 0
    return (place / "whole.jsonl").read_bytes()


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_generate(place: Path, capsys, *arguments: str) -> str:
    words = ["--model", str(place / "hf"), "--max_new_tokens", str(TOKENS), "--greedy", *arguments]
    assert generate.main(words) == 0
    return capsys.readouterr().out


def test_answers_are_those_of_generate(place, whole, capsys):
    """One by one; of a record with an answer the thought is opened as the answer has it."""
    given = lines_of(place / "whole.jsonl")
    assert [line["record"].partition(" (")[0] for line in given] == [
        f"{place}/records.json, record {number}" for number in range(1, len(QUESTIONS) + 1)
    ]
    assert [line["question"] for line in given] == QUESTIONS
    more = [[], ["--image", f"{place}/0.png"], ["--image", f"{place}/1.png"], ["--image", f"{place}/1.png"]]
    more += [["--no_thinking"], ["--thinking"], ["--system", "Be brief."]]
    for line, question, words in zip(given, QUESTIONS, more, strict=True):
        text = by_generate(place, capsys, "--prompt", question, *words)
        thought = f"<think>\n{line['thought']}\n</think>\n\n" if "thought" in line else ""
        assert thought + line["answer"] == text.strip(), question
    assert [line.get("label") for line in given] == [None] * 4 + ["7", "8", None]
    assert len({line["answer"] for line in given}) > 4


def test_a_bad_answer_is_no_label(place, ask, tmp_path):
    """One that its loss mask leaves out: who counts right answers by the file would count it."""
    asked = [{"role": "user", "content": "What?"}]
    turns = [[*asked, {"role": "assistant", "content": "7", "loss": loss}] for loss in (False, True)]
    write(tmp_path / "records.json", [{"messages": messages} for messages in turns])
    ask("--data", str(tmp_path / "records.json"))
    bad, good = lines_of(tmp_path / "answers.jsonl")
    assert "label" not in bad and good["label"] == "7" and bad["answer"] == good["answer"]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batches_change_nothing(whole, ask, tmp_path, batch):
    assert ask("--batch", str(batch)).startswith(f"{tmp_path}/answers.jsonl: asked about 7 records")
    assert (tmp_path / "answers.jsonl").read_bytes() == whole


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The number of prompts of each call of the model."""
    calls: list[int] = []

    def counted(model, prompts, *rest):
        calls.append(len(prompts))
        return generate.generate(model, prompts, *rest)

    monkeypatch.setattr(predict, "generate", counted)
    return calls


def test_a_file_that_ends_anywhere_is_completed(place, whole, ask, asked, tmp_path):
    """Nothing with a whole line is asked again, and batches begin where they would have begun."""
    out, beside = tmp_path / "answers.jsonl", "answers.jsonl.settings.json"
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    positions = [*random.Random(0).sample(range(1, len(whole)), 4), ends[1], ends[2], ends[-1]]
    for position in positions:
        shutil.copy(place / "whole.jsonl.settings.json", tmp_path / beside)
        out.write_bytes(whole[:position])
        asked.clear()
        done = whole[:position].count(b"\n")
        before = f", {done} of them before" * (done > 0)
        assert f": asked about 7 records{before}" in ask("--batch", "2")
        assert out.read_bytes() == whole
        assert sum(asked) == 7 - done and max(asked, default=0) <= 2
        assert asked[1:] == [2, 2, 1][-len(asked[1:]) :] if len(asked) > 1 else True


def test_a_run_that_is_killed_goes_on(place, whole, ask, tmp_path):
    """kill -9 of a real process that has answered a batch, and waits before its third."""
    out = tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "qwen35.inference.predict", *options(place, out, "--batch", "2")]
    slowed = f"""
import sys
from qwen35.inference import predict
generate, calls = predict.generate, []
def waiting(*rest):
    calls.append(1)
    assert len(calls) < 3 or sys.stdin.read()
    return generate(*rest)
predict.generate = waiting
sys.exit(predict.main({command[3:]!r}))
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", slowed], cwd=ROOT, stdin=pipe, stderr=pipe) as process:
        while not (out.exists() and out.stat().st_size):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        taken = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert taken.returncode == 1 and "answers.jsonl: another process is writing it" in taken.stderr
    done = out.read_bytes().count(b"\n")
    assert done in (2, 4)
    assert f", {done} of them before" in ask("--batch", "2")
    assert out.read_bytes() == whole


def test_ctrl_c_says_how_to_go_on(whole, ask, monkeypatch, tmp_path, capsys, place):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict, "generate", interrupted)
        assert predict.main(options(place, tmp_path / "answers.jsonl")) == 130
    assert "the same command completes" in capsys.readouterr().err
    ask()
    assert (tmp_path / "answers.jsonl").read_bytes() == whole


CHANGES = {
    "an option": (["--max_new_tokens", "11"], "max_new_tokens: 10 -> 11"),
    "the template": (["--template", "qwen3_vl_nothink"], "template: qwen3_5 -> qwen3_vl_nothink"),
    "sizes": (["--image_max_pixels", "4096"], "image_max_pixels: 262144 -> 4096"),
    "sampling": (["--temperature", "2", "--seed", "1"], "temperature: 0.0 -> 2.0"),
    "thoughts": (["--thinking"], "thinking: None -> True"),
}


@pytest.mark.parametrize(
    "change", [*CHANGES, "data", "weights", "config", "no settings", "foreign line", "other order"]
)
def test_answers_that_were_made_otherwise_stay(place, whole, ask, tmp_path, change):
    out = tmp_path / "answers.jsonl"
    shutil.copy(place / "whole.jsonl.settings.json", tmp_path / "answers.jsonl.settings.json")
    out.write_bytes(before := whole[: whole.index(b"\n") + 1])
    words, said = CHANGES.get(change, ([], ""))
    if change == "data":
        write(tmp_path / "records.json", [*records(place), {"messages": [{"role": "user", "content": "one more"}]}])
        for image in place.glob("*.png"):
            shutil.copy(image, tmp_path)
        words, said = (
            ["--data", f"{tmp_path}/records.json"],
            "answers.jsonl holds answers that were made otherwise (records: ",
        )
    elif change == "weights":
        words, said = ["--model", str(place / "bf16")], "made otherwise (weights: "
    elif change == "config":  # of the same weights
        folder = shutil.copytree(place / "hf", tmp_path / "hf")
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["rope_parameters"]["rope_theta"] *= 2
        (folder / "config.json").write_text(json.dumps(config))
        words, said = ["--model", str(folder)], "made otherwise (config.json: "
    elif change == "no settings":
        (tmp_path / "answers.jsonl.settings.json").unlink()
        said = "answers.jsonl.settings.json: no such file, so that nobody knows what made the answers"
    elif change == "foreign line":
        out.write_bytes(before := b'{"what": 1}\n' + before)
        said = "answers.jsonl: line 1 is not the answer that belongs there"
    elif change == "other order":
        first, second, *_ = whole.splitlines(keepends=True)
        out.write_bytes(before := second + first)
        said = "answers.jsonl: line 2 is not the answer"
    assert said in ask(*words, status=1)
    assert out.read_bytes() == before


def test_a_drawn_seed_is_kept(ask, tmp_path):
    out = tmp_path / "answers.jsonl"
    ask("--temperature", "2", "--batch", "2")
    drawn = out.read_bytes()
    out.write_bytes(drawn[: drawn.index(b"\n") + 3])
    ask("--temperature", "2", "--batch", "2")
    assert out.read_bytes() == drawn
    out.unlink()
    ask("--temperature", "2", "--batch", "2")
    assert out.read_bytes() != drawn  # a seed of its own


@pytest.fixture
def spoilt(place, tmp_path) -> Path:
    """Records of which four are bad; the last has a header alone."""
    asked = records(place)
    asked.insert(1, {"messages": [{"role": "assistant", "content": "no question"}]})
    asked.insert(3, {"image": "none.png", "conversations": [{"from": "human", "value": "<image>?"}]})
    asked.insert(5, ["no record"])
    asked.insert(7, {"image": "half.png", "conversations": [{"from": "human", "value": "<image>?"}]})
    for image in place.glob("?.png"):
        shutil.copy(image, tmp_path)
    noise = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:3000])
    write(tmp_path / "records.json", asked)
    return tmp_path / "records.json"


def settings(place: Path, data: Path, **basic):
    flat = {f"data.dataset_param.basic_parameters.{name}": value for name, value in basic.items()}
    flat |= {"data.dataset_param.basic_parameters.dataset": str(data), "training.train_iters": 1}
    flat |= {"data.dataset_param.basic_parameters.dataset_dir": str(data.parent), "training.save": str(data.parent)}
    return from_flat(flat | {"model.model_name_or_path": str(place / "hf")})


@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_a_bad_record_is_told_as_in_training(place, spoilt, ask, tmp_path, left):
    """The first one, before anything is asked; that of a damaged image where it is decoded."""
    asked = json.loads(spoilt.read_text())
    bad = [1, 3, 5, 7][left]
    answered = {"role": "assistant", "content": "x"}
    kept = [asked[bad] if i == bad else asked[0] for i in range(bad + 1)]
    write(spoilt, kept)
    said = ask("--data", str(spoilt), "--batch", "2", status=1)
    assert f"records.json, record {bad + 1}" in said
    assert (tmp_path / "answers.jsonl").exists() == (left == 3)  # what came before it is there
    for record in kept:  # training needs answers
        if isinstance(record, dict):
            turns = record.get("messages") or record["conversations"]
            turns += [answered] if "messages" in record else [{"from": "gpt", "value": "x"}]
            del turns[2:]
    write(spoilt, kept)
    dataset = settings(place, spoilt, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(RecordError, match=f"record {bad + 1}") as error:
        open_dataset(dataset, silent)[bad]
    what = str(error.value).partition(f"record {bad + 1}")[2].partition(", dataset_dir is")[0].partition(";")[0]
    assert len(what) > 20 and what in said


def test_bad_records_are_skipped_and_counted(place, spoilt, whole, capsys, tmp_path):
    out = tmp_path / "answers.jsonl"
    words = [*options(place, out, "--data", str(spoilt), "--batch", "3"), "--on_bad_record", "skip"]
    assert predict.main(words) == 0
    err = capsys.readouterr().err
    assert "data: skipped 3: 2 malformed, 1 image missing; first: " in err and "data: skipped 1: " in err
    given = [{k: v for k, v in line.items() if k != "record"} for line in lines_of(out)]
    assert given == [{k: v for k, v in json.loads(line).items() if k != "record"} for line in whole.splitlines()]
    complete = out.read_bytes()
    for count in (3, 4, 5):
        out.write_bytes(b"".join(complete.splitlines(keepends=True)[:count]))
        assert predict.main(words) == 0
        assert out.read_bytes() == complete


def test_a_recipe_brings_a_runs_settings(place, spoilt, ask, tmp_path, monkeypatch):
    """Its names of fields, template and what it does with bad records."""
    asked = [
        {"dialog": r["messages"]} if "messages" in r else r for r in json.loads(spoilt.read_text()) if type(r) is dict
    ]
    write(spoilt, [asked[0], asked[1], asked[-1]])
    recipe = settings(place, spoilt, on_bad_record="skip", template="qwen3_vl_nothink")
    data = replace(recipe.data.dataset_param, attr=replace(recipe.data.dataset_param.attr, messages="dialog"))
    recipe = replace(recipe, data=replace(recipe.data, dataset_param=data))
    (tmp_path / "run.yaml").write_text(to_yaml(recipe))
    assert load_settings(tmp_path / "run.yaml").data.dataset_param.attr.messages == "dialog"
    prompts: list[str] = []
    tokenizer = ChatTokenizer(place / "hf")
    monkeypatch.setattr(
        predict,
        "generate",
        lambda _, asked, *rest: prompts.extend(tokenizer.decode(p.input_ids) for p in asked) or [[]] * len(asked),
    )
    assert "dialog" in ask("--data", str(spoilt), status=1)
    ask("--data", str(spoilt), "--recipe", str(tmp_path / "run.yaml"))
    assert len(prompts) == 2 and prompts[0] == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_files_may_have_formats_and_names_of_their_own(place, whole, ask, tmp_path):
    """As entries of `dataset`: the answers are those to the same records in the usual form."""
    write(place / "alpaca.json", [{"instruction": QUESTIONS[0]}, {"instruction": QUESTIONS[4], "output": "7"}])
    turns = [{"who": "Q", "said": QUESTIONS[5]}, {"who": "A", "said": "8", "reasoning_content": "since"}]
    write(place / "odd.json", [{"talk": turns}])
    names = "{messages: talk, role_tag: who, content_tag: said, user_tag: Q, assistant_tag: A}"
    alpaca, odd = f"{{file: {place}/alpaca.json, format: alpaca}}", f"{{file: {place}/odd.json, attr: {names}}}"
    ask("--data", f"[{alpaca}, {odd}]")
    given, known = lines_of(tmp_path / "answers.jsonl"), [json.loads(line) for line in whole.splitlines()]
    assert [line["record"].rpartition("/")[2] for line in given] == [
        "alpaca.json, record 1", "alpaca.json, record 2", "odd.json, record 1",
    ]  # fmt: skip
    assert [line | {"record": ""} for line in given] == [known[i] | {"record": ""} for i in (0, 4, 5)]
    for data, said in (
        (f"{place}/alpaca.json", "Alpaca's fields are read with"),
        (f"[{{file: {place}/alpaca.json, fromat: alpaca}}]", "dataset[0].fromat; did you mean"),
        (f"[{{file: {place}/alpaca.json, format: alpaca, weight: 2}}]", "leave the weights out"),
        (f"[{alpaca}]", "answers that were made otherwise (records: "),
    ):
        assert said in ask("--data", data, status=1)


def test_evaluation_is_a_comparison_of_the_same_answers(place, whole, capsys, tmp_path):
    """Labelled with some of the answers that predict gives, exactly these are right."""
    given = lines_of(place / "whole.jsonl")
    labelled = records(place)
    kept = [0, 1, 2, 3, 6]
    chosen = [labelled[i] for i in kept]
    for number, (record, i) in enumerate(zip(chosen, kept, strict=True)):
        turns = record.get("messages") or record["conversations"]
        tags = ("from", "gpt", "value") if "conversations" in record else ("role", "assistant", "content")
        turns.append({tags[0]: tags[1], tags[2]: given[i]["answer"] if number % 2 else "wrong"})
    write(tmp_path / "labelled.json", chosen)
    words = ["--model", str(place / "hf"), "--data", str(tmp_path / "labelled.json"), "--dataset_dir", str(place)]
    assert (
        predict.main([*words, "--out", str(tmp_path / "a.jsonl"), "--max_new_tokens", str(TOKENS), "--no_thinking"])
        == 0
    )
    again = lines_of(tmp_path / "a.jsonl")
    right = sum(line["answer"] == line["label"] and "cut" not in line for line in again)
    assert [line["answer"] == line["label"] for line in again] == [False, True, False, True, False]
    capsys.readouterr()
    assert evaluate.main([*words, "--max_new_tokens", str(TOKENS), "--no_thinking"]) == 0
    assert capsys.readouterr().out == f"held-out accuracy {right / 5:.3f} ({right}/5)\n"


def test_the_weights_digest_sees_a_step_and_not_a_copy(place):
    config = json.loads((place / "hf/config.json").read_text())
    one, same, other = (Qwen35.from_config(config, seed) for seed in (1, 1, 2))
    digests = [answers_file.weights_digest(model) for model in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]
    with torch.no_grad():
        one.model.language_model.norm.weight += 1e-3
    assert answers_file.weights_digest(one) != digests[0]
