"""mm-convert, with the seed's words: there, back, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoint_cases import LAYOUTS, assert_same_bytes, build, resave, tensors_in, write_folder
from peer import config_dict

from qwen35.checkpoint import load_checkpoint, newest_checkpoint, resolve_load, save_checkpoint
from qwen35.convert import main

TIE = json.dumps({"lm_head.weight": "model.language_model.embed_tokens.weight"})


def there(folder, out, *more):
    return main(["GenericDCPConverter", "hf_to_dcp", "--hf_dir", str(folder), "--dcp_dir", str(out), *more])


def back(dcp, origin, out):
    return main(["dcp_to_hf", "--dcp_dir", str(dcp), "--origin_hf_dir", str(origin), "--save_hf_dir", str(out)])


@pytest.mark.parametrize("shard_size", [2**30, 50_000])
@pytest.mark.parametrize(
    ("kind", "layout", "tie"),
    [({}, layout, None) for layout in LAYOUTS]
    + [({"moe": False, "tied": True}, "hub", TIE), ({"moe": False, "tied": True, "mtp": False}, "hub", None)],
)
def test_there_and_back_is_byte_identical(tmp_path, capsys, kind, layout, tie, shard_size):
    folder = write_folder(tmp_path / "hf", layout=layout, shard_size=shard_size, **kind)
    assert there(folder, tmp_path / "dcp", *(["--tie_weight_mapping", tie] if tie else [])) == 0
    assert sorted(p.name for p in (tmp_path / "dcp").iterdir()) == ["latest_checkpointed_iteration.txt", "release"]
    assert (tmp_path / "dcp" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert resolve_load(tmp_path / "dcp") == resolve_load(tmp_path / "dcp" / "release")
    for dcp in (tmp_path / "dcp", tmp_path / "dcp" / "release"):
        assert back(dcp, folder, tmp_path / "out") == 0
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    tensors = tensors_in(folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(tensors)} tensors, {sum(t.nbytes for t in tensors.values()):,} bytes, {tmp_path / 'out'}"
    assert lines[0].endswith(str(tmp_path / "dcp" / "release"))


def test_converted_weights_train_and_export(tmp_path):
    """release -> fp32 model without MTP -> iter_ -> Hugging Face: trained tensors rounded, MTP the source's bytes."""
    folder = write_folder(tmp_path / "hf")
    there(folder, tmp_path / "dcp")
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
    assert back(tmp_path / "run", folder, tmp_path / "out") == 0
    out = tensors_in(tmp_path / "out")
    assert torch.equal(out.pop("lm_head.weight"), model.lm_head.weight.to(torch.bfloat16))
    assert_same_bytes(out, {n: t for n, t in source.items() if n != "lm_head.weight"})
    assert back(tmp_path / "run" / "iter_0000003", folder, tmp_path / "out2") == 0


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
def test_what_does_not_fit_is_one_line(tmp_path, capsys, change, tie, words):
    folder = write_folder(tmp_path / "hf")
    if change:
        resave(folder, change)
    code = there(folder, tmp_path / "dcp", *(["--tie_weight_mapping", tie] if tie else []))
    errors = capsys.readouterr().err.splitlines()
    if words is None:
        assert code == 0
        return
    assert code == 1
    assert len(errors) == 1
    assert re.search(words, errors[0])
    assert not (tmp_path / "dcp").exists()


def test_other_mistakes(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf")

    def error(code):
        text = capsys.readouterr().err
        assert code == 1
        assert text.count("\n") == 1
        return text

    assert "no such folder" in error(there(tmp_path / "none", tmp_path / "dcp"))
    assert "no such folder" in error(back(tmp_path / "none", folder, tmp_path / "out"))
    assert "no whole checkpoint" in error(back(folder, folder, tmp_path / "out"))
    save_checkpoint(tmp_path / "run", 1, build(config_dict(), mtp=False))
    assert "holds the checkpoints of a training run" in error(there(folder, tmp_path / "run"))
    other = write_folder(tmp_path / "other", moe=False)
    assert "do not fit" in error(back(tmp_path / "run", other, tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "not written by this program" in error(back(tmp_path / "run", folder, tmp_path / "full"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type 'llama'" in error(there(folder, tmp_path / "dcp"))
    (folder / "config.json").unlink()
    assert "config.json" in error(there(folder, tmp_path / "dcp"))
    with pytest.raises(SystemExit):
        main(["hf_to_dcp", "--hf_dir", "a", "--dcp_dir", "b", "--tie_weight_mapping", "{'a': 1}"])
    assert "is not a JSON object of names" in capsys.readouterr().err


def test_killed_while_it_writes(tmp_path):
    """kill -9 at the sight of the first data file: nothing is taken for whole, and the same command succeeds."""
    folder = write_folder(tmp_path / "hf")
    code = "import sys, time, torch; save = torch.save\n"
    code += "torch.save = lambda *a, **k: (time.sleep(0.05), save(*a, **k))\n"
    code += "from qwen35.convert import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "hf_to_dcp", "--hf_dir", str(folder), "--dcp_dir", str(tmp_path / "dcp")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("dcp/*/*.distcp")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "dcp" / "release.tmp").exists()
    assert newest_checkpoint(tmp_path / "dcp") is None
    assert there(folder, tmp_path / "dcp") == 0
    assert sorted(p.name for p in (tmp_path / "dcp").iterdir()) == ["latest_checkpointed_iteration.txt", "release"]
