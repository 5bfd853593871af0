"""Experiment trackers, `training.report_to`: they get what metrics.jsonl gets, on rank 0.

Addresses, keys and offline modes are each tracker's own environment variables, and stay there. The
ids by which a run that resumes goes on in its own pages are in `<save>/trackers.json`.
"""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image

from qwen35.checkpoint.folders import write_atomic
from qwen35.config.load import flat_settings
from qwen35.config.schema import Settings
from qwen35.errors import SettingError, read_object
from qwen35.log import logger

FILE = "trackers.json"
EXTRAS = {"mlflow": "mlflow-skinny"}  # what is installed of a package
FOLDER = "save"  # in that file, beside the ids: the run's folder
PROJECT = "qwen35"  # where a tracker's own variable names no other


class Tracker(Protocol):
    id: str

    def __init__(self, folder: Path, known: str | None, done: int, recipe: Mapping[str, Any]): ...
    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def show(self, step: int, name: str, text: str, images: Sequence[Image]) -> None: ...
    def close(self) -> None: ...


def check_installed(names: Sequence[str]) -> None:
    """Raises SettingError for a tracker whose package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise SettingError(
                f"training.report_to: {name} is missing; install it (.venv/bin/pip install {EXTRAS.get(name, name)})"
            )


def open_trackers(settings: Settings, folder: Path, done: int) -> list[Tracker]:
    """The trackers of a run; one that has done some steps goes on where these are."""
    names, file, recipe = settings.training.report_to, folder / FILE, flat_settings(settings)
    ids: dict[str, str] = read_object(file, SettingError) if done and file.exists() else {}
    here = str(folder.absolute())
    if (begun := ids.get(FOLDER, here)) != here:
        logger.warning(f"{file}: the run goes on in the pages that {begun} began; remove the file to begin others")
    trackers: list[Tracker] = [OPEN[name](folder, ids.get(name), done, recipe) for name in names]
    if ids := {name: tracker.id for name, tracker in zip(names, trackers, strict=True)}:
        write_atomic(file, json.dumps({FOLDER: here, **ids}) + "\n")
    return trackers


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as numbers; the load of experts as its mean and worst layer."""
    values: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            values |= {f"{name}/{part}": number for part, number in value.items()}
        elif isinstance(value, list):
            values |= {f"{name}/mean": sum(value) / len(value), f"{name}/max": max(value)}
        elif name != "step":
            values[name] = value
    return values


class TensorBoard:
    """Event files in `<save>/tensorboard`; a resumed run hides the steps that it does anew."""

    id = "tensorboard"

    def __init__(self, folder: Path, known: str | None, done: int, recipe: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        self.writer.add_text("recipe", f"```\n{json.dumps(recipe, indent=1)}\n```", done)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def show(self, step: int, name: str, text: str, images: Sequence[Image]) -> None:
        self.writer.add_text(name, f"```\n{text}\n```", step)
        for number, image in enumerate(images):
            self.writer.add_image(f"{name}/{number}", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """WANDB_API_KEY, WANDB_PROJECT, WANDB_MODE=offline and so on; plots are over our step."""

    def __init__(self, folder: Path, known: str | None, done: int, recipe: Mapping[str, Any]):
        import wandb

        self.library, self.id = wandb, known or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:21]
        ours = {"project": PROJECT, "name": folder.name, "dir": str(folder)}
        ours = {key: value for key, value in ours.items() if not os.environ.get(f"WANDB_{key.upper()}")}
        self.run = wandb.init(
            **ours, id=self.id, resume="allow", config=dict(recipe), settings=wandb.Settings(console="off")
        )
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def show(self, step: int, name: str, text: str, images: Sequence[Image]) -> None:
        pictures = {f"{name}/images": [self.library.Image(image) for image in images]} if images else {}
        self.run.log({"step": step, name: self.library.Html(as_page(text), inject=False)} | pictures)

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    """SWANLAB_API_KEY, SWANLAB_PROJ_NAME, SWANLAB_MODE=offline and so on."""

    def __init__(self, folder: Path, known: str | None, done: int, recipe: Mapping[str, Any]):
        import swanlab

        self.library, self.id = swanlab, known or os.environ.get("SWANLAB_RUN_ID") or uuid.uuid4().hex[:21]
        project = os.environ.get("SWANLAB_PROJ_NAME") or PROJECT
        swanlab.init(
            project=project, experiment_name=os.environ.get("SWANLAB_EXP_NAME") or folder.name, id=self.id,
            resume="allow", logdir=str(folder / "swanlab"), config=dict(recipe),
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.library.log(dict(values), step=step)

    def show(self, step: int, name: str, text: str, images: Sequence[Image]) -> None:
        pictures = {f"{name}/images": [self.library.Image(image) for image in images]} if images else {}
        self.library.log({name: self.library.Text(text)} | pictures, step=step)

    def close(self) -> None:
        self.library.finish()


class MLflow:
    """MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and so on. It sends in the background."""

    def __init__(self, folder: Path, known: str | None, done: int, recipe: Mapping[str, Any]):
        import mlflow

        self.library = mlflow
        mlflow.config.enable_async_logging(True)
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            mlflow.set_experiment(PROJECT)
        self.id = mlflow.start_run(run_id=known, run_name=folder.name).info.run_id
        mlflow.log_dict(dict(recipe), "recipe.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.library.log_metrics(dict(values), step=step)

    def show(self, step: int, name: str, text: str, images: Sequence[Image]) -> None:
        self.library.log_text(as_page(text), f"{name}/{step}.html")
        for number, image in enumerate(images):
            self.library.log_image(image, f"{name}/{step}_{number}.png")

    def close(self) -> None:
        self.library.flush_async_logging()
        self.library.end_run()


OPEN: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "swanlab": SwanLab, "mlflow": MLflow}


def as_page(text: str) -> str:
    return f"<pre style='white-space: pre-wrap'>{escape(text)}</pre>"
