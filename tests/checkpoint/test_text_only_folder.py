"""Text-only checkpoints: read, converted and written back under their own names."""

import json
from pathlib import Path

import pytest
import torch
from adapter_cases import run_on
from checkpoint_cases import (
    assert_same_bytes,
    resave,
    tensors_in,
    write_folder,
    write_text_only,
)
from hf_folder import LAYOUTS
from peer import config_dict, sample, text_only
from safetensors.torch import load_file

from qwen35.checkpoint import load_pretrained
from qwen35.checkpoint.dcp_folder import resolve_load
from qwen35.checkpoint.dcp_source import DCPSource
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.hf import load_hf, not_read
from qwen35.convert import main
from qwen35.model import Qwen35

TIE = json.dumps({"lm_head.weight": "model.embed_tokens.weight"})
FP32 = {"dtype_of": lambda _: torch.float32}


def to_dcp(folder: Path, out: Path, *more: str) -> int:
    return main(["hf_to_dcp", "--hf_dir", str(folder), "--dcp_dir", str(out), *more])


def to_hf(dcp: Path, origin: Path, out: Path, *more: str) -> int:
    return main(["dcp_to_hf", "--dcp_dir", str(dcp), "--origin_hf_dir", str(origin), "--save_hf_dir", str(out), *more])


@pytest.mark.parametrize(
    ("kind", "tie"),
    [
        *(({"layout": layout}, None) for layout in LAYOUTS),
        ({"moe": False}, None),
        ({"moe": False, "tied": True}, TIE),
        ({"moe": False, "mtp": False, **FP32}, None),
        ({"mtp": False, "layout": "per_expert"}, None),
    ],
)
def test_round_trip_is_byte_identical(tmp_path, kind, tie):
    folder = write_text_only(tmp_path / "hf", **kind)
    assert to_dcp(folder, tmp_path / "dcp", *(["--tie_weight_mapping", tie] if tie else [])) == 0
    assert all(n.startswith(("model.language_model.", "mtp.", "lm_head.")) for n in dcp_names(tmp_path / "dcp"))
    assert to_hf(tmp_path / "dcp", folder, tmp_path / "out") == 0
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    names = tensors_in(tmp_path / "out")
    assert "model.layers.3.self_attn.q_proj.weight" in names
    assert not any(name.startswith(("model.language_model.", "model.visual.")) for name in names)


def dcp_names(dcp: Path) -> set[str]:
    return set(DCPSource(resolve_load(dcp)).specs)


def test_a_stored_head_of_tied_weights_is_compared_and_written(tmp_path, capsys):
    folder = write_text_only(tmp_path / "hf", moe=False, tied=True, mtp=False)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    resave(folder, add)
    assert to_dcp(folder, tmp_path / "dcp") == 0 and to_hf(tmp_path / "dcp", folder, tmp_path / "out") == 0
    assert_same_bytes(tensors_in(tmp_path / "out"), tensors_in(folder))
    resave(folder, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert to_dcp(folder, tmp_path / "other") == 1
    assert "lm_head.weight differs from model.embed_tokens.weight" in capsys.readouterr().err


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_transformers_loads_the_folder_and_its_export_and_answers_the_same(tmp_path, moe):
    from transformers import AutoModelForCausalLM

    folder = write_text_only(tmp_path / "hf", moe=moe, mtp=False, **FP32)
    assert to_dcp(folder, tmp_path / "dcp") == 0 and to_hf(tmp_path / "dcp", folder, tmp_path / "out") == 0
    batch, ours = sample([23]), load_pretrained(folder)
    for one in (folder, tmp_path / "out"):
        theirs = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
        assert type(theirs).__name__ == json.loads((one / "config.json").read_text())["architectures"][0]
        with torch.no_grad():
            wanted = theirs(input_ids=batch.input_ids[None]).logits[0]
        error = (ours.logits(batch) - wanted).norm() / wanted.norm()
        assert error < 1e-4, error


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_what_transformers_saves_is_read_and_written_back(tmp_path, moe):
    """From the text-only folder, and from the language model of a folder with a tower."""
    from transformers import AutoModelForCausalLM

    write_text_only(tmp_path / "flat", moe=moe, mtp=False, **FP32)
    write_folder(tmp_path / "whole", moe=moe, mtp=False, **FP32)
    for source in ("flat", "whole"):
        saved, out = tmp_path / f"saved {source}", tmp_path / f"out {source}"
        AutoModelForCausalLM.from_pretrained(tmp_path / source, dtype=torch.float32).save_pretrained(saved)
        assert json.loads((saved / "config.json").read_text())["model_type"].endswith("_text")
        assert not_read(saved) == []
        assert_same_bytes(load_pretrained(saved).state_dict(), load_pretrained(tmp_path / "flat").state_dict())
        assert to_dcp(saved, tmp_path / f"dcp {source}") == 0
        assert to_hf(tmp_path / f"dcp {source}", saved, out) == 0
        assert_same_bytes(tensors_in(out), tensors_in(saved))
        assert (out / "config.json").read_bytes() == (saved / "config.json").read_bytes()


def test_a_tower_beside_a_flat_config_is_refused(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", mtp=False)
    (folder / "config.json").write_text(json.dumps(text_only(config_dict())))
    assert to_dcp(folder, tmp_path / "dcp") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.json is of a text-only model, and the weights have a vision tower" in line
    assert "model.visual." in line


def test_missing_tensors_are_named_as_the_folder_has_them(tmp_path):
    folder = write_text_only(tmp_path / "hf", mtp=False)
    resave(folder, lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"))
    model = Qwen35.from_config(text_only(config_dict()))
    with pytest.raises(CheckpointError, match=r"1 tensor missing: model\.layers\.1\.input_layernorm\.weight$"):
        load_hf(model, folder)


def test_a_run_of_a_vision_language_model_is_not_exported_as_text_only(tmp_path, capsys):
    flat, whole = write_text_only(tmp_path / "flat", mtp=False), write_folder(tmp_path / "whole", mtp=False)
    assert to_dcp(whole, tmp_path / "dcp") == 0
    assert to_hf(tmp_path / "dcp", flat, tmp_path / "out") == 1
    assert "was made with another config.json (vision" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_are_merged_and_exported_under_its_names(tmp_path):
    base = write_text_only(tmp_path / "hf", mtp=False, **FP32)
    run_on(base, tmp_path / "run", base)
    assert to_hf(tmp_path / "run", base, tmp_path / "merged") == 0
    assert tensors_in(tmp_path / "merged").keys() == tensors_in(base).keys()
    assert to_hf(tmp_path / "run", base, tmp_path / "adapter", "--adapter") == 0
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["target_modules"] == ["out_proj", "q_proj"]


def test_rope_parameters_that_rope_scaling_replaces_are_reported(tmp_path):
    folder = write_text_only(tmp_path / "hf", moe=False, mtp=False)
    config = json.loads((folder / "config.json").read_text())
    section = {"mrope_section": [2, 1, 1], "type": "yarn", "factor": 2.0}
    for more, said in (({}, True), ({"rope_theta": 1e7}, False)):
        (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": section | more}))
        lines = not_read(folder)
        assert len(lines) == said
        assert all("in whose place rope_scaling stands" in line and "is therefore 10000" in line for line in lines)
