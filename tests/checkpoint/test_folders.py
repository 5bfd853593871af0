"""Folders are replaced by one process at a time, and never if they hold files of others."""

import time

import pytest
import torch
from checkpoint_cases import source_of, tensors_in, write_folder
from forked import Forked, ran, run_code

from qwen35.checkpoint import hf_write
from qwen35.checkpoint.convert import main
from qwen35.checkpoint.dcp_folder import LATEST
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.folders import INCOMPLETE
from qwen35.checkpoint.hf_write import save_hf
from qwen35.checkpoint.lock import LOCK


def test_files_of_others_in_an_export_are_never_lost(tmp_path):
    folder = write_folder(tmp_path / "hf")
    (folder / "figures").mkdir()
    (folder / "figures/a.svg").touch()
    source, out = source_of(folder), tmp_path / "out"
    save_hf(source, folder, out)
    save_hf(source, folder, out)
    (out / "config.json").write_text("{}")  # damaged, and then replaced
    save_hf(source, folder, out)
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    mine = ["README.md", "figures/b.svg", "notes/a.txt", "z.txt"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    words = r"with 4 files that this program did not write: README.md, figures/b.svg, notes/a.txt and 1 more; choose another"
    with pytest.raises(CheckpointError, match=words):
        save_hf(source, folder, out)
    assert {(out / name).read_text() for name in mine} == {"mine"}
    for name in mine[1:]:
        (out / name).unlink()
    with pytest.raises(
        CheckpointError, match=r"with a file that this program did not write: README\.md; choose .* it away"
    ):
        save_hf(source, folder, out)
    (out / "README.md").unlink()
    manifest = out / hf_write.EXPORT_MANIFEST
    manifest.write_text("{}")
    with pytest.raises(CheckpointError, match=r"\.qwen35\.json does not list its files; move it away"):
        save_hf(source, folder, out)


@pytest.mark.parametrize("is_there", [True, False])
def test_export_through_a_link_replaces_its_target(tmp_path, is_there):
    """The link stays, and its target is written and replaced."""
    folder, link = write_folder(tmp_path / "hf"), tmp_path / "link"
    link.symlink_to("disk/out")
    (tmp_path / "disk").mkdir()
    if is_there:
        (tmp_path / "disk/out").mkdir()
    for _ in range(2):
        save_hf(source_of(folder), folder, link)
        assert {path.name for path in tmp_path.iterdir()} == {"hf", "link", "disk"}
        assert link.is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
        assert (link / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_release_through_a_link_replaces_its_target(tmp_path):
    folder, dcp, disk = write_folder(tmp_path / "hf"), tmp_path / "dcp", tmp_path / "disk"
    dcp.mkdir()
    disk.mkdir()
    (dcp / "release").symlink_to("../disk/weights")
    for _ in range(2):
        assert main(["hf_to_dcp", "--hf_dir", str(folder), "--dcp_dir", str(dcp)]) == 0
        assert {path.name for path in dcp.iterdir()} == {"release", LATEST} and (dcp / "release").is_symlink()
        assert [path.name for path in disk.iterdir()] == ["weights"]
        assert (dcp / "release/complete.json").is_file()


def test_files_of_others_in_a_release_are_never_lost(tmp_path, capsys):
    folder, dcp = write_folder(tmp_path / "hf"), tmp_path / "dcp"
    command = ["hf_to_dcp", "--hf_dir", str(folder), "--dcp_dir", str(dcp)]
    assert [main(command), main(command)] == [0, 0]
    (dcp / "release/README.md").write_text("mine")
    assert main(command) == 1
    assert "with a file that this program did not write: README.md; choose" in capsys.readouterr().err
    assert (dcp / "release/README.md").read_text() == "mine"


CONVERT_SLOWLY = """
import sys, time
from qwen35.checkpoint import convert, lock
def read(self, name, region, quick=convert.FiniteSource.read):
    print("in it", flush=True)
    time.sleep(600)
if sys.argv.pop(1) == "hang":
    convert.FiniteSource.read = read
lock.LOCK_TIMEOUT = 0.2
raise SystemExit(convert.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["hf_to_dcp", "dcp_to_hf"])
def test_two_processes_do_not_write_one_folder(tmp_path, command):
    """The second is refused in one line; a killed process leaves neither a lock nor an obstacle."""
    folder, dcp, out = write_folder(tmp_path / "hf"), tmp_path / "dcp", tmp_path / "out"
    there = ["hf_to_dcp", "--hf_dir", str(folder), "--dcp_dir", str(dcp)]
    if command == "dcp_to_hf":
        assert main(there) == 0
    words = there if command == "hf_to_dcp" else ["dcp_to_hf", "--dcp_dir", str(dcp), "--origin_hf_dir", str(folder)]
    words += ["--save_hf_dir", str(out)] * (command == "dcp_to_hf")
    target = dcp / "release" if command == "hf_to_dcp" else out
    first = Forked(ran, [CONVERT_SLOWLY, "hang", *words], {})
    while "in it" not in first.out:
        assert first.poll() is None
        time.sleep(0.01)
    second = run_code(CONVERT_SLOWLY, "go", *words)
    assert second.returncode == 1
    busy = f"mm-convert: {target}.tmp is in use by another job (process {first.pid} on "
    assert [line for line in second.stderr.splitlines() if line.startswith("mm-convert")] == [
        second.stderr.splitlines()[-1]
    ]
    assert second.stderr.splitlines()[-1].startswith(busy)
    first.kill()
    first.communicate()
    third = run_code(CONVERT_SLOWLY, "go", *words)
    assert third.returncode == 0, third.stderr
    assert {path.name for path in target.parent.iterdir()} <= {"hf", "dcp", "out", "release", LATEST}
    assert not {INCOMPLETE, LOCK} & {path.name for path in target.iterdir()}
    if command == "dcp_to_hf":
        assert tensors_in(out).keys() == tensors_in(folder).keys()
        assert all(torch.equal(values, tensors_in(folder)[name]) for name, values in tensors_in(out).items())
