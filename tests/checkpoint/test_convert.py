"""mm-convert in both directions, with MindSpeed-MM's arguments, and what it refuses."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    assert_same_bytes,
    build,
    resave,
    save_checkpoint,
    state_of,
    tensors_in,
    write_folder,
)
from forked import Forked, launched
from hf_folder import LAYOUTS
from peer import config_dict

from qwen35.checkpoint import load_pretrained
from qwen35.checkpoint.dcp import load_checkpoint
from qwen35.checkpoint.dcp_folder import newest_checkpoint, resolve_load
from qwen35.checkpoint.dcp_source import DCPSource
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.hf_read import HFFolder
from qwen35.convert import main

ROOT = Path(__file__).parents[2]
TIE = json.dumps({"lm_head.weight": "model.language_model.embed_tokens.weight"})


def to_dcp(folder, out, *more):
    return main(["GenericDCPConverter", "hf_to_dcp", "--hf_dir", str(folder), "--dcp_dir", str(out), *more])


def to_hf(dcp, origin, out):
    return main(["dcp_to_hf", "--dcp_dir", str(dcp), "--origin_hf_dir", str(origin), "--save_hf_dir", str(out)])


@pytest.mark.parametrize("shard_size", [2**30, 50_000])
@pytest.mark.parametrize(
    ("kind", "layout", "tie"),
    [
        *(({}, layout, None) for layout in LAYOUTS),
        ({"moe": False, "tied": True}, "hub", TIE),
        ({"moe": False, "tied": True, "mtp": False}, "hub", None),
        ({"mtp": False, "dtype_of": lambda _: torch.float32}, "per_expert", None),
        ({"dtype_of": lambda _: torch.float32}, "hub", None),
        ({"moe": False, "dtype_of": lambda _: torch.bfloat16}, "hub", None),
    ],
)
def test_round_trip_is_byte_identical(tmp_path, capsys, kind, layout, tie, shard_size):
    folder = write_folder(tmp_path / "hf", layout=layout, shard_size=shard_size, **kind)
    assert to_dcp(folder, tmp_path / "dcp", *(["--tie_weight_mapping", tie] if tie else [])) == 0
    assert sorted(p.name for p in (tmp_path / "dcp").iterdir()) == ["latest_checkpointed_iteration.txt", "release"]
    assert (tmp_path / "dcp" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert resolve_load(tmp_path / "dcp") == resolve_load(tmp_path / "dcp" / "release")
    for dcp in (tmp_path / "dcp", tmp_path / "dcp" / "release"):
        assert to_hf(dcp, folder, tmp_path / "out") == 0
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    tensors = tensors_in(folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(tensors)} tensors, {sum(t.nbytes for t in tensors.values()):,} bytes, {tmp_path / 'out'}"
    assert lines[0].endswith(str(tmp_path / "dcp" / "release"))
    assert lines.count(f"weights from {tmp_path / 'dcp' / 'release'}") == 2
    held = len(DCPSource(resolve_load(tmp_path / "dcp")).specs)
    assert lines[-2].startswith(f"the checkpoint has {held} tensors: ") == (held != len(tensors))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trained_mtp_layer_is_exported(tmp_path, layout):
    """In the layout of the source."""
    folder = write_folder(tmp_path / "hf", layout=layout)
    trained = build(config_dict(mtp_num_hidden_layers=1), mtp=True, seed=8)
    save_checkpoint(tmp_path / "run", 1, trained)
    assert to_hf(tmp_path / "run", folder, tmp_path / "out") == 0
    wanted = state_of(trained)
    assert HFFolder(tmp_path / "out").specs == HFFolder(folder).specs
    assert_same_bytes(dict(load_pretrained(tmp_path / "out", mtp=True).named_parameters()), wanted)


def test_converted_weights_train_and_export(tmp_path, capsys):
    """An export rounds the trained fp32 tensors and has the source's own bytes for MTP."""
    folder = write_folder(tmp_path / "hf")
    to_dcp(folder, tmp_path / "dcp")
    model = build(config_dict(), mtp=False, seed=4)
    load_checkpoint(tmp_path / "dcp", model)
    source = tensors_in(folder)
    assert torch.equal(model.lm_head.weight, source["lm_head.weight"].float())
    with torch.no_grad():
        model.lm_head.weight.mul_(1.7)
    optimizer = torch.optim.AdamW([model.lm_head.weight])
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    optimizer.step()
    save_checkpoint(tmp_path / "run", 3, model, optimizer)
    assert to_hf(tmp_path / "run", folder, tmp_path / "out") == 0
    mtp = sum(name.startswith("mtp.") for name in source)
    assert (
        f": {mtp} of multi-token prediction, which was not trained, are copied from {folder}\n"
        in capsys.readouterr().out
    )
    out = tensors_in(tmp_path / "out")
    assert torch.equal(out.pop("lm_head.weight"), model.lm_head.weight.to(torch.bfloat16))
    assert_same_bytes(out, {n: t for n, t in source.items() if n != "lm_head.weight"})
    assert to_hf(tmp_path / "run" / "iter_0000003", folder, tmp_path / "out2") == 0


def test_export_uses_the_newest_complete_checkpoint_and_says_so(tmp_path, capsys):
    """Not the one named in the file, after an interruption; skipped checkpoints are reported."""
    folder = write_folder(tmp_path / "hf", mtp=False)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "run", step, build(config_dict(), mtp=False, seed=step))
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("1")
    (tmp_path / "run/iter_0000003/complete.json").unlink()
    assert to_hf(tmp_path / "run", folder, tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    run = tmp_path / "run"
    assert lines[:-1] == [
        f"{run}/iter_0000003 is incomplete and was skipped ({run}/iter_0000003/complete.json: no such file)",
        f"{run}/latest_checkpointed_iteration.txt names iter_0000001, but iter_0000002 is newer and complete, and is used",
        f"weights from {run}/iter_0000002",
    ]
    head = build(config_dict(), mtp=False, seed=2).lm_head.weight.to(torch.bfloat16)
    assert torch.equal(tensors_in(tmp_path / "out")["lm_head.weight"], head)


def test_damaged_checkpoint_is_not_exported(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", mtp=False)
    for step in (1, 2):
        save_checkpoint(tmp_path / "run", step, build(config_dict(), mtp=False, seed=step))
    checkpoint = tmp_path / "run/iter_0000002"
    chunk = json.loads((checkpoint / "tensors.json").read_text())["model.lm_head.weight"]["chunks"][0]
    data = bytearray((checkpoint / chunk["file"]).read_bytes())
    data[chunk["begin"] + 77] ^= 1
    (checkpoint / chunk["file"]).write_bytes(data)
    assert to_hf(tmp_path / "run", folder, tmp_path / "out") == 1
    err = capsys.readouterr().err
    words = "is damaged at model.lm_head.weight: a checksum does not match; move it away to use iter_0000001"
    assert err == f"mm-convert: {checkpoint}/__0_0.distcp: {words}\n"
    assert not (tmp_path / "out").exists()


def equal_heads(tensors):
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()


def no_head(tensors):
    del tensors["lm_head.weight"]


def no_norm(tensors):
    del tensors["model.language_model.layers.0.linear_attn.norm.weight"]
    del tensors["model.language_model.layers.1.linear_attn.norm.weight"]


def one_mtp_only(tensors):
    for name in [n for n in tensors if n.startswith("mtp.") and n != "mtp.fc.weight"]:
        del tensors[name]


def other_shape(tensors):
    tensors["model.visual.pos_embed.weight"] = torch.zeros(2, 32)


@pytest.mark.parametrize(
    ("change", "tie", "words"),
    [
        (
            None,
            TIE,
            "lm_head.weight and model.language_model.embed_tokens.weight differ in .*: its weights are not tied",
        ),
        (equal_heads, TIE, None),
        (no_head, TIE, "1 tensor missing: lm_head.weight"),
        (None, '{"lm_head.weight": "model.nothing"}', "has no model.nothing"),
        (None, '{"model.nothing": "lm_head.weight"}', "has no model.nothing, and its config.json does not tie it"),
        (no_norm, None, r"2 tensors missing: model.language_model.layers.\{0-1\}.linear_attn.norm.weight"),
        (one_mtp_only, None, "tensors missing: mtp.pre_fc_norm_embedding.weight"),
        (other_shape, None, r"pos_embed.weight is \[2, 32\] instead of \[36, 32\]"),
    ],
)
def test_mismatch_is_one_line(tmp_path, capsys, change, tie, words):
    folder = write_folder(tmp_path / "hf")
    if change:
        resave(folder, change)
    code = to_dcp(folder, tmp_path / "dcp", *(["--tie_weight_mapping", tie] if tie else []))
    errors = capsys.readouterr().err.splitlines()
    if words is None:
        assert code == 0
        return
    assert code == 1
    assert len(errors) == 1
    assert re.search(words, errors[0])
    assert not (tmp_path / "dcp").exists()


def test_a_folder_with_another_model_is_not_replaced(tmp_path, capsys):
    """Weights of the same names and shapes are: a model is converted and exported again."""
    folder, other = write_folder(tmp_path / "hf"), write_folder(tmp_path / "other", moe=False)
    dcp, out = tmp_path / "dcp", tmp_path / "out"
    for _ in range(2):
        assert to_dcp(folder, dcp) == 0 and to_hf(dcp, folder, out) == 0
    assert to_dcp(other, tmp_path / "other_dcp") == 0
    before = {path: path.read_bytes() for path in [*dcp.rglob("*"), *out.rglob("*")] if path.is_file()}
    capsys.readouterr()
    assert to_dcp(other, dcp) == 1 and to_hf(tmp_path / "other_dcp", other, out) == 1
    for line, named in zip(capsys.readouterr().err.splitlines(), (dcp / "release", out), strict=True):
        assert f"{named} holds another model" in line
    assert {path: path.read_bytes() for path in before} == before


def test_mistakes_are_one_line(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf")

    def error(code):
        text = capsys.readouterr().err
        assert code == 1
        assert text.count("\n") == 1
        return text

    assert "no such folder" in error(to_dcp(tmp_path / "none", tmp_path / "dcp"))
    assert "no such folder" in error(to_hf(tmp_path / "none", folder, tmp_path / "out"))
    assert "no complete checkpoint" in error(to_hf(folder, folder, tmp_path / "out"))
    save_checkpoint(tmp_path / "run", 1, build(config_dict(), mtp=False))
    assert "holds the checkpoints of a training run" in error(to_dcp(folder, tmp_path / "run"))
    other = write_folder(tmp_path / "other", moe=False)
    assert "do not fit" in error(to_hf(tmp_path / "run", other, tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "not written by this program" in error(to_hf(tmp_path / "run", folder, tmp_path / "full"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type 'llama'" in error(to_dcp(folder, tmp_path / "dcp"))
    (folder / "config.json").unlink()
    assert "config.json" in error(to_dcp(folder, tmp_path / "dcp"))
    with pytest.raises(SystemExit):
        main(["hf_to_dcp", "--hf_dir", "a", "--dcp_dir", "b", "--tie_weight_mapping", "{'a': 1}"])
    assert "is not a JSON object of names" in capsys.readouterr().err


@pytest.mark.parametrize("converter", ["GenericDCPConverter", "Qwen35Converter"])
def test_converter_names_of_mindspeed_are_accepted_first_only(tmp_path, capsys, converter):
    folder, dcp, out = write_folder(tmp_path / "hf", mtp=False), tmp_path / "dcp", tmp_path / "out"
    assert main([converter, "hf_to_dcp", "--hf_dir", str(folder), "--dcp_dir", str(dcp)]) == 0
    export = ["dcp_to_hf", "--dcp_dir", str(dcp), "--origin_hf_dir", str(folder), "--save_hf_dir", str(out)]
    assert main([converter, *export]) == 0
    assert_same_bytes(tensors_in(out), tensors_in(folder))
    for wrong in ([*export, converter], [converter, converter, *export], ["LlamaConverter", *export]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
        assert "Converter" in capsys.readouterr().err


# sitecustomize.py: kill -9 when this audit event names a file with this ending
END = """
import os, signal, sys
def hook(event, args):
    if event == {event!r} and str(args[0]).endswith({path!r}):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def killed_at(folder, event, path, *words) -> None:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(END.format(event=event, path=path))
    done = Forked(launched, [sys.executable, "-m", "qwen35.convert", *map(str, words)], {"PYTHONPATH": str(folder)})
    done.communicate(300)
    assert done.returncode == -signal.SIGKILL


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("event", "path"),
    [("open", "__0_0.distcp"), ("open", "complete.json.new"), ("os.rename", "release.tmp")],
    ids=["data", "manifest", "rename"],
)
def test_killed_conversion_is_never_taken_for_complete(tmp_path, event, path):
    """The same command then succeeds."""
    folder = write_folder(tmp_path / "hf")
    killed_at(tmp_path / "at", event, path, "hf_to_dcp", "--hf_dir", str(folder), "--dcp_dir", str(tmp_path / "dcp"))
    assert names_in(tmp_path / "dcp") == ["release.tmp"]
    assert newest_checkpoint(tmp_path / "dcp") is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resolve_load(tmp_path / "dcp")
    assert to_dcp(folder, tmp_path / "dcp") == 0
    assert names_in(tmp_path / "dcp") == ["latest_checkpointed_iteration.txt", "release"]
    assert to_hf(tmp_path / "dcp", folder, tmp_path / "out") == 0
    assert_same_bytes(tensors_in(tmp_path / "out"), tensors_in(folder))


@pytest.mark.parametrize(
    ("event", "path"),
    [("open", "out.tmp/model.safetensors-00002-of-00003.safetensors"), ("os.rename", "out.tmp")],
    ids=["data", "rename"],
)
def test_killed_export_leaves_the_previous_one(tmp_path, event, path):
    folder = write_folder(tmp_path / "hf", shard_size=300_000)
    assert len(list(folder.glob("*.safetensors"))) == 3
    save_checkpoint(tmp_path / "run", 1, build(config_dict(), mtp=False, seed=1))
    assert to_hf(tmp_path / "run", folder, tmp_path / "out") == 0
    before = tensors_in(tmp_path / "out")
    save_checkpoint(tmp_path / "run", 2, build(config_dict(), mtp=False, seed=2))
    words = ("--dcp_dir", str(tmp_path / "run"), "--origin_hf_dir", str(folder), "--save_hf_dir", str(tmp_path / "out"))
    killed_at(tmp_path / "at", event, path, "dcp_to_hf", *words)
    kept = tmp_path / ("out.old" if event == "os.rename" else "out")
    assert_same_bytes(tensors_in(kept), before)
    assert (tmp_path / "out").exists() == (event == "open")
    assert to_hf(tmp_path / "run", folder, tmp_path / "out") == 0
    after = tensors_in(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], build(config_dict(), seed=2, mtp=False).lm_head.weight.bfloat16())
    assert names_in(tmp_path) == ["at", "hf", "out", "run"]
    assert not (tmp_path / "out" / ".incomplete").exists()


def test_progress_bar_reaches_the_end(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "hf")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert to_dcp(folder, tmp_path / "dcp") == 0
    assert re.search(r"hf_to_dcp: 100%.*(\d+)k/\1k", capsys.readouterr().err)
    assert to_hf(tmp_path / "dcp", folder, tmp_path / "out") == 0
    assert re.search(r"dcp_to_hf: 100%.*(\d+)k/\1k", capsys.readouterr().err)
