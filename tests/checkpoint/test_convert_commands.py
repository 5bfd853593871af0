"""Conversion in both directions by make and by the installed mm-convert."""

import json
import os
import subprocess
from pathlib import Path

from adapter_cases import run_on
from checkpoint_cases import tensors_in, write_folder

ROOT = Path(__file__).parents[2]
TIE = json.dumps({"lm_head.weight": "model.language_model.embed_tokens.weight"})


def run(*command: str, cwd: Path = ROOT) -> str:
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mm_convert_to_dcp_and_make_export_round_trip(tmp_path):
    """As test_convert.py does within this process for every layout."""
    folder = write_folder(tmp_path / "hf", moe=False, tied=True)
    dcp, out = tmp_path / "mm_path" / "model", tmp_path / "out"
    paths = ("--hf_dir", str(folder), "--dcp_dir", str(dcp))
    arguments = ("GenericDCPConverter", "hf_to_dcp", *paths, "--tie_weight_mapping", TIE)
    run(str(ROOT / ".venv/bin/mm-convert"), *arguments, cwd=tmp_path)
    assert sorted(path.name for path in dcp.iterdir()) == ["latest_checkpointed_iteration.txt", "release"]
    run("make", "export", f"DCP={dcp}", f"HF={folder}", f"OUT={out}")
    assert {path.name: path.read_bytes() for path in folder.iterdir()}.items() <= {
        path.name: path.read_bytes() for path in out.iterdir()
    }.items()


def test_make_convert_and_mm_convert_to_hf_round_trip(tmp_path):
    folder = write_folder(tmp_path / "hf", moe=False, tied=True)
    run("make", "convert", f"HF={folder}", f"DCP={tmp_path / 'dcp'}", f"TIE={TIE}")
    arguments = ("dcp_to_hf", "--dcp_dir", "dcp/release", "--origin_hf_dir", "hf", "--save_hf_dir", "out")
    output = run(str(ROOT / ".venv/bin/mm-convert"), "GenericDCPConverter", *arguments, cwd=tmp_path)
    assert "tensors" in output
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_make_export_merges_adapters_or_writes_peft_s_folder(tmp_path):
    """Into hf and adapter in the folder of the run, neither in the place of the other."""
    folder, run_folder = write_folder(tmp_path / "hf"), tmp_path / "run"
    made = run_on(folder, run_folder, folder)
    merged = run("make", "export", f"DCP={run_folder}", f"HF={folder}")
    adapter = run("make", "export", f"DCP={run_folder}/iter_0000003", f"HF={folder}", "ARGS=--adapter")
    assert f"{len(made)} adapters are merged into" in merged and adapter.endswith(f" bytes, {run_folder}/adapter\n")
    assert len(tensors_in(run_folder / "hf")) == len(tensors_in(folder))
    assert len(tensors_in(run_folder / "adapter")) == len(made)


def test_mm_convert_outlives_its_reader():
    command = [ROOT / ".venv/bin/mm-convert", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=300)) == (b"", 0)
