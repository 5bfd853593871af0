"""`python -m qwen35.data convert` and `show`, as a user runs them."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizer_fixture import make_model_folder

from qwen35.config.load import load_settings
from qwen35.config.schema import Attr
from qwen35.data.__main__ import main
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.dataloader import open_dataset
from qwen35.data.fields import FieldNames
from qwen35.data.formats import parse_record, read_records
from qwen35.data.media import ImageFolder
from qwen35.data.preview import show
from qwen35.data.tokenized import silent

ROOT = Path(__file__).parents[2]
LLAVA = [
    {
        "id": "000000033471",
        "image": "000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors?"},
            {"from": "gpt", "value": "White and red."},
            {"from": "human", "value": "What is on the back?"},
            {"from": "gpt", "value": "An advertisement — 广告."},
        ],
    },
    {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    {
        "id": "000000000009",
        "image": "sub/000000000009.jpg",
        "conversations": [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "Food."}],
    },
]


@pytest.fixture
def coco(tmp_path):
    """tmp_path/coco/train2017 with both images, and the description file."""
    images = tmp_path / "coco" / "train2017"
    (images / "sub").mkdir(parents=True)
    for name in ("000000033471.jpg", "sub/000000000009.jpg"):
        Image.new("RGB", (90, 30)).save(images / name)
    (tmp_path / "llava.json").write_text(json.dumps(LLAVA))
    return tmp_path


def convert(home, *options):
    out = home / "out" / "records.json"
    return main(
        ["convert", "--llava", f"{home}/llava.json", "--images", f"{home}/coco/train2017", "--out", str(out), *options]
    )


def test_convert(coco, capsys):
    assert convert(coco) == 0
    out = coco / "out" / "records.json"
    assert json.loads(out.read_text()) == [
        {
            "images": ["./train2017/000000033471.jpg"],
            "messages": [
                {"role": "user", "content": "<image>\nWhat are the colors?"},
                {"role": "assistant", "content": "White and red."},
                {"role": "user", "content": "What is on the back?"},
                {"role": "assistant", "content": "An advertisement — 广告."},
            ],
        },
        {"images": [], "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]},
        {
            "images": ["./train2017/sub/000000000009.jpg"],
            "messages": [
                {"role": "user", "content": "What is it?\n<image>"},
                {"role": "assistant", "content": "Food."},
            ],
        },
    ]
    report = capsys.readouterr().out
    assert f"{out}: 3 records, 8 turns, 2 images\n" in report
    assert f"dataset_dir={coco}/coco" in report
    records = list(read_records(out, Attr(), ImageFolder(coco / "coco")))
    assert all(path.is_file() for record in records for path in record.images)
    beside = [out, out.with_suffix(".lengths.png"), out.with_suffix(".report.txt")]
    assert sorted(out.parent.iterdir()) == sorted(beside)


def test_missing_images(coco, capsys):
    (coco / "coco" / "train2017" / "000000033471.jpg").unlink()
    assert convert(coco) == 1
    assert "llava.json: 1 image not in" in (message := capsys.readouterr().err)
    assert "000000033471.jpg; --on_missing skip leaves such records out" in message
    assert not (coco / "out").exists()
    assert convert(coco, "--on_missing", "skip") == 0
    assert (
        "left out: 1 record whose image is not in" in (report := capsys.readouterr().out)
        and "000000033471.jpg" in report
    )
    assert len(json.loads((coco / "out" / "records.json").read_text())) == 2


def change(home, **entry):
    (home / "llava.json").write_text(json.dumps([LLAVA[1], LLAVA[0] | entry]))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"conversations": [{"from": "system", "value": "x"}]},
            "conversations: has no user turn",
        ),
        ({"image": "../../secret.jpg"}, "image: '../../secret.jpg' lies outside"),
        ({"image": ["a.jpg", "b.jpg"]}, "1 <image> in the user and tool turns, but 2 images"),
        ({"conversations": None}, "has no field messages or conversations"),
        ({"video": "v.mp4"}, "1 video but no <video> in the user and tool turns"),
        ({"tools": [{"name": "f"}]}, "has videos, thoughts, tools, calls or boxes, unlike LLaVA"),
        (
            {"conversations": [{"from": "human", "value": "<image><ref-object>"}, {"from": "gpt", "value": "a"}]}
            | {"objects": {"ref": ["x"]}},
            "has videos, thoughts, tools, calls or boxes",
        ),
        ({"label": False}, "has label, which is not read"),
        (
            {"conversations": [LLAVA[0]["conversations"][0], {"from": "gpt", "value": "a", "reasoning_content": "b"}]},
            "has videos, thoughts, tools, calls or boxes",
        ),
    ],
)
def test_convert_names_the_broken_record(coco, capsys, entry, message):
    change(coco, **entry)
    assert convert(coco) == 1
    error = capsys.readouterr().err
    assert "llava.json, record 2 (id 000000033471)" in error and message in error
    assert error.count("\n") == 1


def test_converted_records_read_as_before(coco, capsys):
    """Literal placeholders stay literal, and untrained turns untrained."""
    shown = {"type": "image", "image": "000000033471.jpg"}
    hard = [
        LLAVA[0] | {"loss_mask": [0, 0, 0, 1]},
        {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "<video>", "weight": 1}]},
        {
            "conversations": [
                {"from": "human", "value": [{"type": "text", "text": "Is <image> there: "}, shown]},
                {"from": "gpt", "value": "<image>", "loss": False},
                {"from": "human", "value": [{"type": "text", "text": "And <image>?"}]},
                {"from": "gpt", "value": "a"},
            ]
        },
    ]
    (coco / "llava.json").write_text(json.dumps(hard))
    assert convert(coco) == 0
    assert "\n3 placeholders (<image>, <video>) are kept as text; first: " in capsys.readouterr().out
    images = coco / "coco" / "train2017"
    before = [parse_record(raw, "", FieldNames.of(Attr()), ImageFolder(images), DataWarnings()) for raw in hard]
    after = list(read_records(coco / "out" / "records.json", Attr(), ImageFolder(coco / "coco")))
    assert [record.turns for record in after] == [record.turns for record in before]
    assert [turn.loss for turn in after[0].turns] == [False, False, False, True]
    assert after[2].turns[0].content == ("Is <image> there: ", images / "000000033471.jpg")


def test_convert_without_its_files(coco, capsys):
    (coco / "llava.json").rename(coco / "other.json")
    assert convert(coco) == 1 and "llava.json: no such file; set LLAVA" in capsys.readouterr().err
    (coco / "other.json").rename(coco / "llava.json")
    (coco / "coco").rename(coco / "pics")
    assert convert(coco) == 1 and "train2017: no such folder; set IMAGES" in capsys.readouterr().err


@pytest.fixture
def recipe(coco):
    model = make_model_folder(coco / "model")
    convert(coco)
    lines = f"""
    data:
      dataset_param:
        basic_parameters: {{dataset: "{coco}/out/records.json", dataset_dir: "{coco}/coco", cutoff_len: 100}}
    model: {{model_name_or_path: "{model}"}}
    training: {{train_iters: 1, save: "{coco}/run"}}
    """
    (coco / "run.yaml").write_text(lines)
    return coco / "run.yaml"


def test_show(recipe, capsys):
    capsys.readouterr()
    assert main(["show", str(recipe), "--samples", "3"]) == 0
    out = capsys.readouterr().out
    assert "chat_template.jinja, Qwen3.5's as published; trained tokens are in [[ ]]" in out
    assert "records.json, record 1, part 2 of 2: " in out and "1 image\n" in out and "record 3" not in out
    asked = "<|im_start|>user\n<|vision_start|><|image_pad|>*3<|vision_end|>\nWhat are the colors?<|im_end|>\n"
    history, thought = "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    more = "<|im_start|>user\nWhat is on the back?<|im_end|>\n"
    last = f"{thought}[[An advertisement — 广告.<|im_end|>\n]]"
    assert f"{asked}{thought}[[White and red.<|im_end|>\n]]" in out
    assert f"{asked}{history}White and red.<|im_end|>\n{more}{last}" in out
    assert main(["show", str(recipe), "--samples", "2", "data.dataset_param.basic_parameters.multi_turn=joined"]) == 0
    assert f"{asked}{history}[[White and red.<|im_end|>\n]]{more}{last}" in capsys.readouterr().out
    mask = "data.dataset_param.basic_parameters.mask_history=true"
    for words in ([mask, "--samples", "1"], ["--samples", "1", mask]):
        assert main(["show", str(recipe), *words]) == 0
        assert "[[White" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["show", str(recipe), "--sample_count", "1"])


def test_colour_on_a_terminal_and_no_control_characters_of_the_record(recipe, coco):
    turns = [{"role": "user", "content": "\x1b[31mred"}, {"role": "assistant", "content": "Yo"}]
    (coco / "out" / "records.json").write_text(json.dumps([{"messages": turns}]))
    _, text = show(load_settings(recipe), 1, colour=True)
    assert "\x1b[32mYo<|im_end|>\n\x1b[0m" in text
    assert "user\n\\x1b[31mred<|im_end|>" in text


def test_show_reports_samples_longer_than_cutoff_len(recipe, capsys):
    basic = "data.dataset_param.basic_parameters"
    capsys.readouterr()
    assert main(["show", str(recipe)]) == 0
    lengths = list(map(int, re.findall(r": (\d+) tokens, ", capsys.readouterr().out)))
    limit = min(lengths)  # of the record of text
    assert main(["show", str(recipe), f"{basic}.cutoff_len={limit}"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count(f"MORE THAN cutoff_len {limit}") == 2 and len(lengths) == 3  # all are shown
    assert printed.err.count("\n") == 1
    assert (
        f"of the 3 samples shown, 2 are longer than {basic}.cutoff_len = {limit}, which training refuses; trunc"
        in printed.err
    )
    assert main(["show", str(recipe), "--samples", "1", f"{basic}.cutoff_len={limit}"]) == 1
    assert "of the 1 sample shown, 1 is longer than" in capsys.readouterr().err
    for tolerant in ("truncation=drop", "truncation=truncate", "on_bad_record=skip"):
        assert main(["show", str(recipe), f"{basic}.cutoff_len={limit}", f"{basic}.{tolerant}"]) == 0
        assert f"MORE THAN cutoff_len {limit}, " in capsys.readouterr().out


def test_lengths_are_those_of_training_beside_cutoff_len(recipe, coco, capsys):
    """With and without a recipe: of the samples that training makes of the same records."""
    basic = "data.dataset_param.basic_parameters"
    lengths = open_dataset(load_settings(recipe, [f"{basic}.cutoff_len=1000"]), silent).lengths
    limit, longest = int(np.sort(lengths)[-2]), lengths.max()
    capsys.readouterr()
    picture = coco / "made" / "lengths.png"
    words = ["show", str(recipe), "--lengths", f"{basic}.cutoff_len={limit}", "--picture", str(picture)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"{coco}/out/records.json: 3 records, {len(lengths)} samples\n" in out
    assert f"tokens per sample: p50 {np.sort(lengths)[2]}, p90 {longest}, p99 {longest}, longest {longest}; " in out
    assert f" cutoff_len {limit}: 1 ({1 / len(lengths):.1%}) are longer\n" in out
    assert "\nthose longer than cutoff_len are refused by training (truncation: error)\n" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and out.endswith(f"picture written to {picture}\n")
    for setting, what in (
        ("truncation=drop", "left out"),
        ("truncation=truncate", "cut"),
        ("on_bad_record=skip", "left out"),
    ):
        assert main(["show", str(recipe), "--lengths", f"{basic}.cutoff_len={limit}", f"{basic}.{setting}"]) == 0
        assert f"those longer than cutoff_len are {what} (" in capsys.readouterr().out
    own = ["--data", f"{coco}/out/records.json", "--tokenizer", f"{coco}/model", "--dataset_dir", f"{coco}/coco"]
    assert main(["lengths", *own, "--cutoff_len", str(limit)]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == out.splitlines()[:-1]
    assert (coco / "out/records.lengths.png").is_file()
    assert main(["lengths", "--data", f"[{{file: {own[1]}, format: sharegpt}}]", *own[2:]]) == 0
    assert "\ntokens per sample: p50 " in capsys.readouterr().out
    assert main(["lengths", "--data", f"[{{file: {own[1]}, format: alpaca}}]", *own[2:]]) == 1
    assert "has no question in instruction" in capsys.readouterr().err
    records = json.loads((coco / "out/records.json").read_text())
    inline = base64.b64encode((coco / "coco" / records[0]["images"][0]).read_bytes()).decode()
    records[0]["images"] = [f"data:image/jpeg;base64,{inline}"]
    (coco / "out/records.json").write_text(json.dumps(records))
    assert main(["lengths", *own]) == 0
    inside = capsys.readouterr().out
    assert "cutoff_len 2,048: 0 (0.0%)" in inside and next(line for line in out.splitlines() if "p50" in line) in inside


def test_lengths_count_what_is_skipped_and_obey_max_samples(recipe, coco, capsys):
    basic = "data.dataset_param.basic_parameters"
    records = json.loads((coco / "out" / "records.json").read_text())
    (coco / "out" / "records.json").write_text(json.dumps([records[1], {"messages": []}, *records]))
    capsys.readouterr()
    assert main(["show", str(recipe), "--lengths"]) == 1
    assert "records.json, record 2, messages: is empty" in capsys.readouterr().err
    for most, counted in ((5, "5 records, 5 samples"), (2, "2 records, 1 sample")):
        assert (
            main(["show", str(recipe), "--lengths", f"{basic}.on_bad_record=skip", f"{basic}.max_samples={most}"]) == 0
        )
        out = capsys.readouterr().out
        assert f": {counted}\nskipped 1: 1 malformed; first: " in out
    (coco / "out" / "records.json").write_text(json.dumps([{"messages": []}]))
    assert main(["show", str(recipe), "--lengths", f"{basic}.on_bad_record=skip"]) == 1
    assert "no records left: 1 malformed" in capsys.readouterr().err


def test_errors_are_one_line_and_exit_1(recipe, capsys):
    run = [sys.executable, "-m", "qwen35.data", "show", str(recipe), "training.sed=1"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1 and done.stderr == "unknown setting training.sed; did you mean training.seed?\n"
    assert main(["show", str(recipe), "model.model_name_or_path=/no"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_show_ends_quietly_when_the_pipe_is_closed(recipe):
    done = subprocess.run(
        f"{sys.executable} -m qwen35.data show {recipe} --samples 3 | head -n 1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""


def test_commands_start_without_what_they_do_not_need():
    """Neither transformers nor what shards or compiles: each takes as long to import as torch."""
    programs = (
        "data.__main__ convert inference.generate inference.predict inference.evaluate tools.tiny preflight".split()
    )
    modules = ", ".join(f"qwen35.{program}" for program in programs)
    code = f"""
import sys, torch, {modules}
from qwen35.checkpoint.hf import empty_model
model = empty_model("assets/configs/0.8B.json", lambda name: torch.bfloat16)
print(*{{"transformers", "torch.distributed.tensor", "torch._dynamo"}} & sys.modules.keys(), file=sys.stderr)
sys.exit(len(list(model.parameters())) < 100)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == "\n"
