"""Runs that report to every tracker, offline, read back from what the trackers have written.

`make test-trackers`: their packages are not among those of `make install`.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_runs import make_workplace, start_as_ever

from qwen35.training.metrics import read_metrics
from qwen35.training.trackers import OPEN

ENVIRONMENT = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "MLFLOW_ALLOW_FILE_STORE": "true"}
ENVIRONMENT |= {"WANDB_NAME": "mine by name", "SWANLAB_EXP_NAME": "mine-by-name"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Four steps, then four more of the same run; the mlflow store is beside it."""
    workplace = make_workplace(tmp_path_factory.mktemp("tracked"))
    save = workplace / "run"
    val = f"data.val_dataset_param.basic_parameters.dataset={workplace / 'records.json'}"
    options = [f"training.report_to=[{', '.join(OPEN)}]", "training.val_interval=4", "training.val_generate=true", val]
    options.append("training.log_interval=1")
    environment = {**ENVIRONMENT, "MLFLOW_TRACKING_URI": (workplace / "mlruns").as_uri()}
    for steps in (4, 8):
        process = start_as_ever(workplace, save, 2, *options, f"training.train_iters={steps}", **environment)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err + out
    return save


def wanted(run: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(run / "metrics.jsonl") if name in line}


def ids(run: Path) -> dict[str, str]:
    return json.loads((run / "trackers.json").read_text())


@pytest.mark.parametrize("name", ["loss", "lr", "val_loss", "val_exact_match"])
def test_tensorboard(run, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars(name)}
    assert found == pytest.approx(wanted(run, name), rel=1e-6)
    assert "grad_norms/experts" in events.Tags()["scalars"]
    assert "samples/1/0" in events.Tags()["images"]


@pytest.mark.parametrize("name", ["loss", "val_loss"])
def test_mlflow(run, name, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient((run.parent / "mlruns").as_uri())
    history = client.get_metric_history(ids(run)["mlflow"], name)
    assert {metric.step: metric.value for metric in history} == wanted(run, name)
    assert {file.path for file in client.list_artifacts(ids(run)["mlflow"])} >= {"answers", "recipe.json", "samples"}


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file, which is LevelDB's log format behind a header of 7 bytes."""
    data, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # no header fits into the rest of a block
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb(run):
    from wandb.proto import wandb_internal_pb2

    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert {folder.name.rpartition("-")[2] for folder in folders} == {ids(run)["wandb"]}
    found, names = {}, set()
    for record in (record for folder in folders for record in wandb_records(next(folder.glob("*.wandb")))):
        parsed = wandb_internal_pb2.Record()
        parsed.ParseFromString(record)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in parsed.history.item}
        names |= {parsed.run.display_name} - {""}
        if "loss" in items:
            found[json.loads(items["step"])] = json.loads(items["loss"])
    assert found == wanted(run, "loss") and names == {"mine by name"}


def test_swanlab(run):
    folders = sorted((run / "swanlab").glob("run-*"))
    assert [folder.name.rpartition("-")[2] for folder in folders] == [ids(run)["swanlab"]] * len(folders)
    written = b"".join(path.read_bytes() for folder in folders for path in folder.glob("*.swanlab"))
    for name in (b"loss", b"val_loss", b"grad_norm", b"mine-by-name"):
        assert name in written


def test_no_key_is_written(run):
    """What a run keeps names no variable that holds a key."""
    for file in run.glob("*.*"):
        if file.is_file():
            assert b"API_KEY" not in file.read_bytes(), file
