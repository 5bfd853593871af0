"""`make generate` on folders of every kind, against transformers, and its error messages."""

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import save_checkpoint
from hf_folder import write_hf
from optional import write_video
from peer import continued
from PIL import Image

from qwen35.checkpoint.convert import hf_to_dcp
from qwen35.checkpoint.convert import main as convert
from qwen35.checkpoint.dcp_folder import write_latest
from qwen35.checkpoint.hf import not_read
from qwen35.config.load import from_flat, to_yaml
from qwen35.data.collator import prompt_batch, vision_spec
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.inference import evaluate, generate
from qwen35.inference.load_model import find_model, load_model, prepare
from qwen35.model import Qwen35
from qwen35.tools import tiny

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests/fixtures/templates/chat_template.jinja"  # opens a thought unless told not to
TOKENS = 12
LINE = r"\d+ tokens in \d+\.\d\d s: prefill of \d+ tokens \d+\.\d tokens/s(, decoding \d+\.\d tokens/s)?"
HOW = r", (greedy|temperature [\d.]+)(, \w+ [\d.]+)*( \(by generation_config\.json\))?(, cut at max_new_tokens \d+)?\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An fp32 model: as on the hub, a tensor per expert, converted, saved by a run; two images."""
    place = tmp_path_factory.mktemp("place")
    tiny.make_model(place / "bf16", seed=3)
    config = json.loads((place / "bf16/config.json").read_text())
    model = Qwen35.from_config(config, seed=3, mtp=True)  # what was rounded for the folder bf16
    for layout in ("hub", "per_expert"):
        write_hf(model.state_dict(), config, place / layout, layout=layout, dtype_of=lambda _: torch.float32)
        for file in (place / "bf16").iterdir():
            if file.suffix in {".json", ".jinja"} and not (place / layout / file.name).exists():
                shutil.copy(file, place / layout)
    hf_to_dcp(place / "hub", place / "converted")
    save_checkpoint(place / "run", 5, model)
    write_recipe(place, "run", place / "hub")
    for i in range(2):
        pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / f"{i}.png")  # one token each
    return place


def write_recipe(place: Path, save: str, model: Path, **parameters) -> None:
    basic = {"dataset": "gone.json"} | parameters
    flat = {f"data.dataset_param.basic_parameters.{name}": value for name, value in basic.items()}
    flat |= {"model.model_name_or_path": str(model), "training.save": save, "training.train_iters": 5}
    (place / save / "config.yaml").write_text(to_yaml(from_flat(flat)))


@pytest.fixture
def ask(place, capsys, monkeypatch) -> Callable[..., str]:
    """Generate the answer in this process."""

    def ask(model: str, *arguments: str, stdin: str = "", status: int = 0) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()  # what transformers had to say
        assert generate.main(["--model", str(place / model), "--max_new_tokens", str(TOKENS), *arguments]) == status
        out, err = capsys.readouterr()
        if status:
            assert out == "" and err.startswith("error: ") and err.count("\n") == 1
            return err
        if chosen := {"run": "iter_0000005", "plain": "iter_0000005", "converted": "release"}.get(model):
            said, _, err = err.partition("\n")
            assert said == f"weights from {place / model / chosen}"
        if "--video" in arguments and model == "hub":  # whose sizes are not the defaults
            said, _, err = err.partition("\n")
            assert said.startswith(f"{place / model}/video_preprocessor_config.json: not read: size ")
        assert re.fullmatch(LINE + HOW, err), err
        return out

    return ask


def peer(place: Path, content: list[dict], system: str | None = None, model: str = "hub", **template) -> str:
    """transformers' greedy answer to a conversation with images, in its own chat template."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    folder = place / model
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
    pair = "<|vision_start|><|video_pad|><|vision_end|>"  # of 32 x 32 pixels, one token
    videos = [part["video"] for part in content if part["type"] == "video"]
    for times in (TIMES[len(frames)] for frames in videos):
        text = text.replace(pair, "".join(f"<{t} seconds>{pair[:-1]}~" for t in times), 1)  # ~: of those that are done
    ours = ChatTokenizer(folder)
    inputs = dict(tokenizer(text.replace("~", ">"), return_tensors="pt"))
    ids, processor = inputs["input_ids"], AutoImageProcessor.from_pretrained(folder)
    inputs["mm_token_type_ids"] = (ids == ours.image_id).int() + 2 * (ids == ours.video_id).int()
    if images := [Image.open(part["image"]) for part in content if part["type"] == "image"]:
        inputs |= processor(images=images, return_tensors="pt")
    pairs = []
    for frames in videos:
        stills = processor(images=[Image.open(frame) for frame in frames], return_tensors="pt")["pixel_values"]
        stills = stills.reshape(len(frames), 4, 3, 2, 256)  # a still is a pair of the same frame
        for first, second in zip(stills[::2], [*stills[1::2], stills[-1]], strict=False):
            pairs.append(torch.stack([first[:, :, 0], second[:, :, 1]], 2).reshape(4, -1))
    if pairs:
        grids = torch.tensor([[(len(frames) + 1) // 2, 2, 2] for frames in videos])
        inputs |= {"pixel_values_videos": torch.cat(pairs), "video_grid_thw": grids}
    mark_up = re.compile(
        r"<\|(object_ref|box|quad)_(start|end)\|>"
    )  # which an answer may be made of, so they are shown
    hidden = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special and not mark_up.fullmatch(t.content)}
    return tokenizer.decode([i for i in continued(model, inputs, TOKENS) if i not in hidden]) + "\n"


TIMES = {2: ["0.2"], 3: ["0.2", "1.0"]}  # of the pairs of so many frames, half a second each
TEXT = {"type": "text", "text": "Which digit is this?"}


@pytest.fixture(scope="module")
def right(place) -> str:
    return peer(place, [{"type": "image", "image": place / "0.png"}, {"type": "image", "image": place / "1.png"}, TEXT])


@pytest.mark.parametrize("model", ["hub", "per_expert", "run", "run/iter_0000005"])
def test_every_kind_of_checkpoint_answers_as_transformers(place, ask, right, model):
    assert len(right) > TOKENS // 2
    assert ask(model, "--image", str(place / "0.png"), str(place / "1.png"), "--prompt", TEXT["text"]) == right


def test_converted_weights_need_hf(place, ask, right):
    question = ["--image", str(place / "0.png"), "--image", str(place / "1.png"), "--prompt", TEXT["text"]]
    for model in ("converted", "converted/release"):
        assert ask(model, *question, "--hf", str(place / "hub")) == right


def test_text_system_prompt_and_placeholders(place, ask):
    assert ask("hub", "--prompt", "Hello\n", "--system", "Be brief.") == peer(
        place, [{"type": "text", "text": "Hello"}], "Be brief."
    )
    image = {"type": "image", "image": place / "1.png"}
    content = [{"type": "text", "text": "Is this "}, image, {"type": "text", "text": " a user?"}]
    arguments = ["--image", str(place / "1.png")]
    assert ask("hub", *arguments, "--prompt", "Is this <image> a user?") == peer(place, content)
    assert ask("hub", *arguments, stdin="Is this <image> a user?\n") == peer(place, content)


def test_videos_as_files_folders_and_frames(place, ask):
    frames = [place / "0.png", place / "1.png", place / "0.png"]
    folder = place / "frames"
    folder.mkdir()
    for i, frame in enumerate(frames):
        shutil.copy(frame, folder / f"{i + 9}.png")
    image, video = {"type": "image", "image": place / "1.png"}, {"type": "video", "video": frames}
    answer = peer(place, [video, TEXT])
    assert answer != peer(place, [{"type": "video", "video": frames[:2]}, TEXT])
    assert answer == ask("hub", "--video", str(folder), "--prompt", TEXT["text"])
    assert answer == ask("hub", "--video", *map(str, frames), "--prompt", TEXT["text"])
    shown = ["--image", str(place / "1.png"), "--video", str(folder), "--video", *map(str, frames[:2])]
    both = [image, video, {"type": "video", "video": frames[:2]}]
    assert ask("hub", *shown, "--prompt", "What?") == peer(place, [*both, {"type": "text", "text": "What?"}])
    between = [both[1], {"type": "text", "text": " or "}, both[2], image, {"type": "text", "text": "?"}]
    assert ask("hub", *shown, "--prompt", "<video> or <video><image>?") == peer(place, between)


def test_a_video_file_is_decoded(place, ask, monkeypatch):
    frames = np.stack([np.asarray(Image.open(place / f"{i % 2}.png")) for i in range(5)])
    write_video(place / "film.mp4", frames, Fraction(2), monkeypatch)
    listed = [str(place / f"{i % 2}.png") for i in range(5)]
    asked = ["--prompt", TEXT["text"], "--video"]
    assert ask("hub", *asked, str(place / "film.mp4")) == ask("hub", *asked, *listed)


def test_thinking_options_open_or_close_the_thought(place, ask):
    text = [{"type": "text", "text": "What?"}]
    assert ask("hub", "--prompt", "What?") == ask("hub", "--prompt", "What?", "--no_thinking") == peer(place, text)
    thought = ask("hub", "--prompt", "What?", "--thinking")
    assert thought == "<think>\n" + peer(place, text, enable_thinking=True) and thought[9:] != peer(place, text)
    shutil.copytree(place / "hub", place / "thinks")
    shutil.copy(PUBLISHED, place / "thinks")
    assert ask("thinks", "--prompt", "What?") == thought
    (place / "thinks/chat_template.jinja").unlink()
    assert "--thinking" in ask("thinks", "--prompt", "What?", status=1)


def test_a_run_is_prompted_as_it_trained(place, ask):
    shutil.copytree(place / "run", place / "plain")
    write_recipe(place, "plain", place / "hub", template="qwen3_vl_nothink")
    plain = ask("hub", "--prompt", "What?", "--template", "qwen3_vl_nothink")
    assert ask("plain", "--prompt", "What?") == plain != ask("hub", "--prompt", "What?")
    assert ask("hub", "--prompt", "What?", "--recipe", str(place / "plain/config.yaml")) == plain
    assert "no thoughts" in ask("plain", "--prompt", "What?", "--thinking", status=1)
    shutil.copytree(place / "hub", place / "opens")
    shutil.copy(PUBLISHED, place / "opens")
    for said, word, folder in (
        (True, "--thinking", "hub"),
        (False, "--no_thinking", "opens"),
    ):  # against the template's own
        write_recipe(place, "plain", place / folder, enable_thinking=said)
        assert ask("plain", "--prompt", "What?") == ask("hub", "--prompt", "What?", word)
        assert ask("plain", "--prompt", "What?", "--no_thinking") == ask("hub", "--prompt", "What?")
    write_recipe(place, "plain", place / "gone")
    assert "gone" in ask("plain", "--prompt", "What?", status=1)
    assert ask("plain", "--prompt", "What?", "--hf", str(place / "hub")) == ask("hub", "--prompt", "What?")


def test_an_export_that_is_older_than_its_run_says_so(place):
    """`make generate` and `make evaluate` ask it by default, while the run has gone on."""
    run = place / "goes_on"
    for step, seed in ((5, 3), (6, 4)):
        model = Qwen35.from_config(json.loads((place / "bf16/config.json").read_text()), seed=seed, mtp=True)
        save_checkpoint(run, step, model)
        write_recipe(place, "goes_on", place / "hub")
        write_latest(run, step)
        if step == 5:
            exported = ["--origin_hf_dir", str(place / "hub"), "--save_hf_dir", str(run / "hf")]
            assert convert(["dcp_to_hf", "--dcp_dir", str(run), *exported]) == 0
            assert find_model(run / "hf").messages == (f"{run}/hf: asked as its run's {run}/config.yaml says",)
    told = (
        f"{run}/hf was exported from iter_0000005, and {run}/iter_0000006 is newer: make export writes it anew, or name"
    )
    assert find_model(run / "hf").messages[1].startswith(told)
    assert not_read(run / "hf")[-1].startswith(told)  # to train or convert it
    assert convert(["dcp_to_hf", "--dcp_dir", str(run), *exported]) == 0
    assert len(find_model(run / "hf").messages) == 1
    shutil.rmtree(run / "iter_0000006")  # and another run's stands in its place
    save_checkpoint(run, 6, Qwen35.from_config(json.loads((place / "bf16/config.json").read_text()), seed=5, mtp=True))
    assert "was exported from iter_0000006, and" in find_model(run / "hf").messages[1]


def test_a_run_in_fp32_answers_as_its_export_in_bf16(place):
    found = find_model(place / "run", place / "bf16")
    model, export = load_model(found), load_model(find_model(place / "bf16"))
    for (name, ours), theirs in zip(model.named_parameters(), export.parameters(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    bare = place / "bare"  # a model folder without weights: the published dtypes
    bare.mkdir()
    for file in (place / "bf16").glob("*.json"):
        if "index" not in file.name:
            shutil.copy(file, bare)
    for (name, ours), theirs in zip(
        load_model(find_model(place / "run", bare)).named_parameters(), export.parameters(), strict=True
    ):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


def test_the_answer_ends_at_the_folders_eos_tokens(place, ask):
    source = find_model(place / "hub")
    args = generate.parse(["--model", str(place / "hub"), "--prompt", "Hello"])
    preparation, spec = prepare(args, source), vision_spec(source.config)
    asked = prompt_batch(generate.question(args), preparation, spec, thinking=False)
    ids = generate.generate(load_model(source), [asked], TOKENS, ())[0]
    shutil.copytree(place / "hub", place / "stops")
    config = json.loads((place / "stops/generation_config.json").read_text())
    config["eos_token_id"] = [ids[4]]
    (place / "stops/generation_config.json").write_text(json.dumps(config))
    before = preparation.tokenizer.decode(ids[: ids.index(ids[4])], control=False)
    assert ask("stops", "--prompt", "Hello") == before + "\n"


def test_sampling_options(place, ask):
    question = ["--prompt", "Hello", "--temperature", "2"]
    one, same, other = (ask("hub", *question, "--seed", seed) for seed in ("1", "1", "2"))
    assert one == same != other
    assert ask("hub", *question, "--top_k", "1") == ask("hub", "--prompt", "Hello")
    assert ask("hub", *question) != ask("hub", *question)  # seeds of their own
    assert "temperature" in ask("hub", "--prompt", "Hello", "--top_k", "3", status=1)
    assert "top_p 0.0" in ask("hub", *question, "--top_p", "0", status=1)


@pytest.fixture
def says(place, tmp_path) -> Callable[..., str]:
    """The model with these values in its generation_config.json, beside the eos tokens."""

    def says(**values) -> str:
        folder = tmp_path / "says"
        shutil.copytree(place / "hub", folder, dirs_exist_ok=True)
        ends = json.loads((place / "hub/generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps(ends | values))
        return str(folder)

    return says


def test_the_folders_penalty_is_that_of_transformers(place, ask, says):
    model = says(repetition_penalty=1.4, top_k=3, do_sample=False)  # what is not drawn needs no top_k
    image = {"type": "image", "image": place / "0.png"}
    penalised = peer(place, [image, TEXT], model=model)
    question = ["--prompt", TEXT["text"], "--image", str(place / "0.png")]
    assert ask(model, *question) == penalised != ask("hub", *question)
    assert ask(model, *question, "--repetition_penalty", "1") == ask("hub", *question) == peer(place, [image, TEXT])
    assert ask("hub", *question, "--repetition_penalty", "1.4") == penalised


def test_the_folders_sampling_is_used(place, ask, says, capsys):
    model = says(do_sample=True, temperature=1.8, top_k=20, top_p=0.95, presence_penalty=0.5, max_new_tokens=5)
    asked = ["--prompt", "Hello", "--seed"]
    by_hand = ["--temperature", "1.8", "--top_k", "20", "--top_p", "0.95", "--presence_penalty", "0.5"]
    answers = [ask(model, *asked, seed) for seed in "123"]
    assert len(set(answers)) == 3
    assert answers == [ask("hub", *asked, seed, *by_hand) for seed in "123"]
    assert ask(model, *asked, "1", "--top_k", "0") == ask("hub", *asked, "1", *by_hand, "--top_k", "0")
    greedy = ["--prompt", "Hello", "--presence_penalty", "0"]
    assert ask(model, *greedy, "--greedy") == ask(model, *greedy, "--temperature", "0") == ask("hub", *greedy)
    assert "one of them" in ask(model, *greedy, "--greedy", "--temperature", "1", status=1)
    capsys.readouterr()
    assert generate.main(["--model", model, *asked, "7"]) == 0
    how = "temperature 1.8, top_k 20, top_p 0.95, presence_penalty 0.5, seed 7 (by generation_config.json)"
    err = capsys.readouterr().err
    assert err.startswith("5 tokens in ") and err.endswith(f", {how}, cut at max_new_tokens 5\n")


WRONG = [
    ("hub", ["--prompt", " \n"], "prompt is empty"),
    ("hub", [], "prompt is empty"),
    ("hub", ["--prompt", "\udcff"], "not UTF-8"),
    ("hub", ["--prompt", "x", "--image", "none.png"], "none.png: no such file"),
    ("hub", ["--prompt", "x", "--image", "Makefile"], "Makefile: is not an image"),
    ("hub", ["--prompt", "<image> <image>", "--image", "none.png"], "2 <image> in the prompt, but 1 image"),
    ("hub", ["--prompt", "<image>"], "1 <image> in the prompt, but 0 images"),
    ("hub", ["--prompt", "<video>"], "1 <video> in the prompt, but 0 videos"),
    ("hub", ["--prompt", "<video>s: <video>", "--video", "a", "b"], "2 <video> in the prompt, but 1 video"),
    ("hub", ["--prompt", "x", "--video", "none.mp4"], "the prompt: video 1 of 1, none.mp4: no such file"),
    ("hub", ["--prompt", "x", "--video", "1.png", "2.png"], "1.png … (2 frames): frame 1 of 2, 1.png: no such file"),
    ("hub", ["--prompt", "x", "--video", "configs"], "configs: is a folder without frames"),
    ("hub", ["--prompt", "x", "--image_max_pixels", "1000"], "image_min_pixels 1024 is above image_max_pixels 1000"),
    ("nowhere", ["--prompt", "x"], "nowhere: no such folder"),
    (".", ["--prompt", "x"], "no complete checkpoint"),
    ("bare_hub", ["--prompt", "x"], "no safetensors files"),
    ("cut", ["--prompt", "x"], "not a complete checkpoint"),
    ("converted", ["--prompt", "x", "--hf", "nowhere"], "nowhere/tokenizer.json: no such file"),
    ("converted", ["--prompt", "x"], "--hf DIR (HF=DIR with make)"),
]


@pytest.mark.parametrize(("model", "arguments", "words"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_a_mistake_is_one_line(place, ask, monkeypatch, model, arguments, words):
    if model == "bare_hub" and not (place / model).exists():
        shutil.copytree(place / "hub", place / model, ignore=shutil.ignore_patterns("*.safetensors*"))
    if model == "cut" and not (place / model).exists():
        shutil.copytree(place / "run/iter_0000005", place / "cut", ignore=shutil.ignore_patterns("complete.json"))
    monkeypatch.chdir(ROOT)
    assert words in ask(model, *arguments, status=1)


def test_weights_of_another_model_are_refused(place, ask):
    shutil.copytree(place / "hub", place / "other")
    config = json.loads((place / "other/config.json").read_text())
    config["text_config"]["moe_intermediate_size"] = 32
    (place / "other/config.json").write_text(json.dumps(config))
    error = ask("run", "--prompt", "x", "--hf", str(place / "other"), status=1)
    assert "iter_0000005 does not fit the model" in error and f"{place}/other/config.json" in error


def test_characters_come_whole_and_control_tokens_never(place):
    tokenizer = ChatTokenizer(place / "hub")  # every character that is not ASCII is several tokens here
    text = "a 描述 <think>ü</think><|box_start|>(1,2)<|box_end|>\n"
    ids = tokenizer.encode_text(text)
    pieces = list(generate.whole_characters([tokenizer.im_end_id, *ids, tokenizer.image_id], tokenizer))
    assert "".join(pieces) == text and "描" in pieces and "ü" in pieces and not any("\ufffd" in p for p in pieces)
    half = tokenizer.encode_text("描")[:2]
    assert list(generate.whole_characters(half, tokenizer)) == ["\ufffd"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_not_read_for_the_prompt(place, ask, monkeypatch):
    monkeypatch.setattr(io, "StringIO", Terminal)
    assert "prompt is empty" in ask("hub", stdin="typed", status=1)


def test_an_interruption_exits_130_without_a_traceback(place, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "draw", interrupted)
    assert generate.main(["--model", str(place / "hub"), "--prompt", "x"]) == 130
    assert capsys.readouterr() == ("\n", "")


def test_evaluation_accepts_a_run(place, tmp_path, capsys):
    records = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "7"}]} for q in "ab"]
    (tmp_path / "records.json").write_text(json.dumps(records))
    shown = []
    for model in ("hub", "run"):
        assert evaluate.main(["--model", str(place / model), "--data", str(tmp_path / "records.json"), "--show"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and shown[0].count("right is '7'") == 2


def test_evaluation_reads_videos(place, tmp_path, capsys, ask):
    frames = ["0.png", "1.png", "0.png"]
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "7"}]
    (tmp_path / "records.json").write_text(json.dumps([{"messages": turns, "videos": [frames]}]))
    given = ask("hub", "--no_thinking", "--prompt", "What?", "--video", *(str(place / name) for name in frames)).strip()
    options = ["--dataset_dir", str(place), "--max_new_tokens", str(TOKENS), "--show"]
    assert evaluate.main(["--model", str(place / "hub"), "--data", str(tmp_path / "records.json"), *options]) == 0
    assert f"record 1: {given!r}, right is '7'" in capsys.readouterr().out


SLEEPS = {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize(("given", "megabytes", "cores", "threads"), [
    ({}, 1, 8, 1), ({}, 127, 8, 1), ({}, 128, 8, 2), ({}, 330, 8, 5), ({}, 100_000, 8, 8), (SLEEPS, 1, 8, 2),
    (SLEEPS, 330, 8, 5), (SLEEPS, 1, 1, 1), (SLEEPS | {"OMP_NUM_THREADS": "3"}, 1, 8, None),
])  # fmt: skip
def test_threads_by_the_size_of_the_model_unless_given(place, monkeypatch, given, megabytes, cores, threads):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        Qwen35, "parameters", lambda _: iter([torch.empty(megabytes << 20, dtype=torch.int8, device="meta")])
    )
    monkeypatch.setattr(Qwen35, "to", lambda model, _: model)
    load_model(find_model(place / "hub"))
    assert chosen == ([threads] if threads else [])


def test_the_text_comes_piece_by_piece(monkeypatch):
    seen = []

    def pieces():
        for piece in ("one", " two"):
            yield piece
            seen.append(sys.stdout.getvalue())

    for out in (Terminal(), io.StringIO()):
        seen.clear()
        monkeypatch.setattr(sys, "stdout", out)
        generate.write(pieces())
        assert seen == ["one", "one two"] and out.getvalue() == "one two\n"


def test_any_tokens_are_the_same_text_in_pieces(place):
    """Bytes that are no characters too, of which a random model's answers are full."""
    tokenizer = ChatTokenizer(place / "hub")
    for seed in range(200):
        ids = torch.randint(310, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        text = tokenizer.decode(ids, control=False)
        pieces = list(generate.whole_characters(ids, tokenizer))
        assert "".join(pieces) == text
        whole = [piece for piece in pieces[:-1] if piece.endswith("\ufffd")]
        assert not whole


@pytest.mark.parametrize("reads_on", [True, False])
def test_a_pipe_gets_each_word_before_the_next_is_drawn(place, right, reads_on):
    """The model waits for a line on standard input before each token but the first two."""
    words = command(place, "hub", "--prompt", TEXT["text"])[3:]
    slowed = f"""
import sys
from qwen35.inference import generate
draw, drawn = generate.draw, []
def waiting(*rest):
    drawn.append(1)
    assert len(drawn) < 6 or sys.stdin.readline()
    return draw(*rest)
generate.draw = waiting
sys.exit(generate.main({words!r}))
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", slowed], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        first = process.stdout.read(3)
        if not reads_on:
            process.stdout.close()
        process.stdin.write(b"go on\n" * TOKENS)
        process.stdin.close()
        err = process.stderr.read().decode()
        assert first + process.stdout.read() == right.encode() if reads_on else not err, err
    assert process.returncode == 0, err


def command(place: Path, model: str, *arguments: str) -> list[str]:
    ask = ["--max_new_tokens", str(TOKENS), "--image", str(place / "0.png"), str(place / "1.png")]
    return [sys.executable, "-m", "qwen35.inference.generate", "--model", str(place / model), *ask, *arguments]


def test_the_command_as_a_process(place, right):
    question = command(place, "run", "--prompt", TEXT["text"])
    done = subprocess.run(question, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, right), done.stderr
    chosen = f"weights from {re.escape(str(place))}/run/iter_0000005\n"
    assert re.fullmatch(chosen + LINE + r", greedy(, cut at max_new_tokens 12)?\n", done.stderr)
    failed = subprocess.run(
        command(place, "hub"), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, input=""
    )
    assert (failed.returncode, failed.stdout) == (1, "") and failed.stderr.startswith("error: the prompt is empty")


def test_the_command_on_a_terminal(place, right):
    ours, theirs = pty.openpty()
    question = command(place, "hub", "--prompt", TEXT["text"])
    with subprocess.Popen(question, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE) as process:
        process.communicate(timeout=120)
    os.close(theirs)
    assert os.read(ours, 10000).decode().replace("\r\n", "\n") == right
    os.close(ours)
