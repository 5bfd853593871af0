"""Weights are used with the config.json that they were made with, and exported with the tokenizer
and processors of their run, if their values are in the range of their dtype.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import state_of, write_folder
from mistakes import change, place, run, whole

from qwen35.checkpoint import load_pretrained
from qwen35.checkpoint.dcp import read_info
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.hf_write import save_hf
from qwen35.checkpoint.slices import TensorSlice, TensorSpec, fill
from qwen35.convert import main
from qwen35.inference import evaluate, generate
from qwen35.inference.load_model import find_model
from qwen35.model import ModelConfig, load_config
from qwen35.model.config import check_same

__all__ = ["place", "whole"]  # fixtures

THETA = ("text_config.rope_parameters.rope_theta", 1e6, "text.rope_theta: 1000000.0 -> 10000.0")
HEADS = ("vision_config.num_heads", 1, "vision.num_heads: 1 -> 2")


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def another(place: Path, key: str, value: object) -> None:
    """The folder other/, with the weights of hf/ and a config of the same shapes."""
    shutil.copytree(place / "hf", place / "other")
    change("other/config.json", key, value)(place)


def to_hf(dcp: str, origin: str, out: str, *more: str) -> int:
    return main(["dcp_to_hf", "--dcp_dir", dcp, "--origin_hf_dir", origin, "--save_hf_dir", out, *more])


@pytest.mark.parametrize(("key", "value", "words"), [THETA, HEADS])
def test_weights_are_refused_where_another_config_would_compute_with_them(place, capsys, key, value, words):
    another(place, key, value)
    done = run(place, "train", "r.yaml", "training.init_from_hf_path=other")
    assert done.code == 1 and f"other was made with another config.json ({words}); set the two alike" in done.err
    assert main(["hf_to_dcp", "--hf_dir", "other", "--dcp_dir", "converted"]) == 0
    done = run(place, "train", "r.yaml", "training.init_from_hf_path=null", "training.load=converted")
    assert done.code == 1 and f"converted/release was made with another config.json ({words})" in done.err
    capsys.readouterr()
    assert to_hf("converted", "hf", "out") == 1 and not Path("out").exists()
    assert words in capsys.readouterr().err
    assert generate.main(["--model", "converted", "--hf", "hf", "--prompt", "Hi"]) == 1
    assert words in capsys.readouterr().err
    assert to_hf("converted", "other", "out") == 0


def test_adapters_are_refused_where_another_config_would_compute_with_them(place, capsys):
    """That of their base, and that of the run that trained them."""
    key, value, words = THETA
    another(place, key, value)
    lora = ("train", "r.yaml", "training.lora.r=8", "training.train_iters=2")
    done = run(place, *lora, "training.init_from_hf_path=other")
    assert done.code == 1 and f"other was made with another config.json ({words}); set the two alike" in done.err
    done = run(place, *lora, "training.train_iters=1")
    assert done.code == 0, done.err
    done = run(place, *lora, "training.init_from_hf_path=other")
    assert done.code == 1 and f"other was made with another config.json ({words})" in done.err
    words = "run/iter_0000001 was made with another config.json (text.rope_theta: 10000.0 -> 1000000.0)"
    done = run(place, *lora, "training.init_from_hf_path=other", "model.model_name_or_path=other")
    assert done.code == 1 and words in done.err
    capsys.readouterr()
    for more in ([], ["--adapter"]):
        assert to_hf("run", "other", "out", *more) == 1 and not Path("out").exists()
        assert words in capsys.readouterr().err
    assert generate.main(["--model", "run", "--hf", "other", "--prompt", "Hi"]) == 1
    assert words in capsys.readouterr().err
    assert to_hf("run", "hf", "out") == 0 and run(place, *lora).code == 0


def test_what_loaded_weights_do_not_compute_with_may_differ(place):
    another(place, "text_config.initializer_range", 0.5)
    change("other/config.json", "text_config.mtp_num_hidden_layers", 0)(place)
    assert run(place, "train", "r.yaml", "training.init_from_hf_path=other").code == 0


def test_converted_weights_of_before_do_not_say_of_which_config_they_are(place):
    config: ModelConfig = load_config(place / "hf")
    assert read_info(place / "dcp/release").extra.keys() == {"model"}
    check_same("dcp", read_info(place / "dcp/release").extra["model"], config)
    check_same("dcp", {}, config)


class Stored:
    """A TensorSource of one tensor."""

    def __init__(self, **tensors: torch.Tensor):
        self.tensors = tensors
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def read(self, name: str, region: TensorSlice) -> torch.Tensor:
        return self.tensors[name][region.slices()]


@pytest.mark.parametrize(("value", "fits"), [(65_504.0, True), (1e5, False), (-1e5, False)])
def test_what_float16_cannot_hold_does_not_become_infinite(tmp_path, value, fits):
    half = {"dtype_of": lambda _: torch.float16}
    folder = write_folder(tmp_path / "hf", moe=False, **half)
    state = {name: p.float() for name, p in state_of(load_pretrained(folder)).items()}
    name = "model.visual.merger.linear_fc2.bias"
    state[name][3] = value
    into = {name: torch.zeros_like(state[name], dtype=torch.float16)}
    if fits:
        save_hf(Stored(**state), folder, tmp_path / "out")
        fill(into, Stored(**state))
        assert load_pretrained(tmp_path / "out").get_parameter(name)[3] == into[name][3] == value
        return
    words = rf"^{name} has values beyond 65,504, the largest of float16; use bf16$"
    with pytest.raises(CheckpointError, match=words):
        save_hf(Stored(**state), folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=words):
        fill(into, Stored(**state))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [(), ("training.lora.r=8",)], ids=["", "with adapters"])
def test_an_export_has_the_tokenizer_and_processors_of_its_run(place, capsys, more):
    """They may lie in a folder of their own; those of the model folder would prompt otherwise."""
    Path("tokens").mkdir()
    for file in [*Path("hf").glob("*.json"), *Path("hf").glob("*.jinja")]:
        shutil.copy(file, "tokens")
    change("tokens/preprocessor_config.json", "image_mean", [0.25, 0.25, 0.25])(place)
    (place / "hf/chat_template.json").write_text(json.dumps({"chat_template": "of the model"}))
    setting = "data.dataset_param.preprocess_parameters.model_name_or_path=tokens"
    done = run(place, "train", "r.yaml", setting, *more)
    assert done.code == 0, done.err
    assert to_hf("run", "hf", "out") == 0
    assert "tokenizer and processors from tokens, with which the run trained" in capsys.readouterr().out
    assert json.loads(Path("out/preprocessor_config.json").read_text())["image_mean"] == [0.25, 0.25, 0.25]
    assert not Path("out/chat_template.json").exists()
    assert Path("out/config.json").read_bytes() == Path("hf/config.json").read_bytes()
    if more:  # PEFT's folder has none
        assert to_hf("run", "hf", "adapter", "--adapter") == 0
        assert "serve it with the tokenizer and processors of tokens, with which" in capsys.readouterr().out
    (place / "secret").write_text("x")
    Path("tokens/merges.txt").symlink_to(place / "secret")
    assert to_hf("run", "hf", "again") == 1 and not Path("again").exists()
    assert "tokens/merges.txt: a link out of the model folder" in capsys.readouterr().err
    shutil.rmtree("tokens")
    assert to_hf("run", "hf", "again") == 1 and not Path("again").exists()
    assert "run/config.yaml: the tokenizer's folder tokens is not there; put it back" in capsys.readouterr().err


def test_an_export_is_asked_with_the_sizes_of_its_run(place, capsys):
    """In its run's folder; elsewhere it is told where the sizes are not those of its files."""
    done = run(place, "train", "r.yaml")
    assert done.code == 0, done.err
    assert to_hf("run", "hf", "run/hf") == 0
    trained = find_model("run").train_set
    assert trained.preprocess_parameters.image_max_pixels == 4096
    assert find_model("run/hf").train_set == trained
    assert find_model("hf").train_set is None
    shutil.move("run/hf", "moved")
    change("moved/preprocessor_config.json", "size", {"shortest_edge": 1024, "longest_edge": 8192})(place)
    words = (
        "not read: size {'shortest_edge': 1024, 'longest_edge': 8192}; those of the options or the defaults are used"
    )
    asked = ["--max_new_tokens", "1"]
    capsys.readouterr()
    assert generate.main(["--model", "moved", "--prompt", "Hi", "--image", "data/1.png", *asked]) == 0
    assert words in capsys.readouterr().err
    assert evaluate.main(["--model", "moved", "--data", "data/a.json", *asked]) == 0
    assert words in capsys.readouterr().err
    assert generate.main(["--model", "moved", "--prompt", "Hi", *asked]) == 0
    assert "size" not in capsys.readouterr().err
    named = ["--recipe", "run/config.yaml"]
    assert generate.main(["--model", "moved", "--prompt", "Hi", "--image", "data/1.png", *asked, *named]) == 0
    assert "size" not in capsys.readouterr().err
