"""What a run starts from: found, opened and compared with the model, and loaded.

A run of all weights has one source: a checkpoint or a model folder. A LoRA run has two: the base,
and its adapters, which are a checkpoint's, those of PEFT's folder, or new ones.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.optim import Optimizer

from qwen35.checkpoint.dcp import CheckpointInfo, load_checkpoint, open_matching_checkpoint, read_info
from qwen35.checkpoint.dcp_folder import METADATA, RELEASE, newest_checkpoint, resolve_load
from qwen35.checkpoint.dcp_source import DCPSource
from qwen35.checkpoint.errors import CheckpointError, Mismatch
from qwen35.checkpoint.hf import load_hf, not_read, open_matching_folder
from qwen35.checkpoint.hf_names import base_parameters, saved_parameters, shapes_of
from qwen35.checkpoint.hf_read import has_weights
from qwen35.checkpoint.merged import AdapterRun, digest, holds_adapters
from qwen35.checkpoint.peft_folder import PeftFolder
from qwen35.checkpoint.slices import FiniteSource, TensorSlice, TensorSource, fill
from qwen35.config.load import SettingError
from qwen35.config.schema import LoraSettings, Settings
from qwen35.data.other_tokenizers import other_tokenizers
from qwen35.model import Qwen35
from qwen35.training.adapters import InitialAdapters, lora_spec

REFERENCE = "reference"  # in extra.json: a digest of the weights that a run of pairs began with


class Chosen(NamedTuple):
    path: Path  # the newest whole checkpoint in `save`, else `load`, else `init_from_hf_path`
    base: Path  # the same, or the weights that adapters in that checkpoint are for


def find_weights(settings: Settings, goes_on: bool = True) -> Chosen:
    """All ranks use rank 0's choice, since another job may be saving into `load` at this moment.

    goes_on: from a checkpoint in `save`, if there is one. Raises SettingError, CheckpointError.
    """
    choices: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(choices, choose_weights(settings, goes_on))
    return choices[0]


def choose_weights(settings: Settings, goes_on: bool = True) -> Chosen:
    """As `find_weights`, for this process alone."""
    t, newest = settings.training, newest_checkpoint(settings.training.save) if goes_on else None
    if newest or t.load:
        path = newest or resolve_load(t.load or "")
        if t.lora and holds_adapters(DCPSource(path)):
            if t.lora.adapter and not newest:
                raise SettingError(
                    f"training.load: {t.load} and training.lora.adapter: {t.lora.adapter} both hold adapters to go on from;"
                    " leave one out"
                )
            if t.stage == "dpo" and goes_on and not newest:
                raise SettingError(
                    f"training.load: {t.load} holds adapters, and the reference of pairs is a base without any; merge them "
                    "first (make export), and start from that folder: training.init_from_hf_path"
                )
            return Chosen(path, Path(t.init_from_hf_path or AdapterRun.of(read_info(path)).base))
        if t.lora and newest:
            raise SettingError(
                f"training.save: {t.save} holds a run without adapters; name another folder for training.lora, and this one as "
                "training.load to start from its weights"
            )
        return Chosen(path, path)
    if t.init_from_hf_path:
        return Chosen(Path(t.init_from_hf_path), Path(t.init_from_hf_path))
    raise SettingError(
        "nothing says where the weights come from; set training.load (DCP) or training.init_from_hf_path"
    )


class Start:
    """The chosen weights, of which only headers are read; while this exists, nobody removes them.

    Raises CheckpointError, SettingError unless they fit the model and the settings.
    """

    def __init__(self, chosen: Chosen, model: Qwen35, settings: Settings):
        self.path, self.base = chosen
        self.model, self.lora = model, settings.training.lora
        named, of_config = settings.training.init_from_hf_path, settings.model.model_name_or_path
        self.is_hf = self.base == Path(named or "") or not (self.base / METADATA).is_file()  # the base
        self.goes_on = self.path != self.base if self.lora else not self.is_hf  # from the place that a run had reached
        opened = (open_matching_folder if self.is_hf else open_matching_checkpoint)(model, self.base)
        self.sources: list[TensorSource] = [opened]
        self.notes = [f"weights from {self.base}"]
        self.warnings: list[str] = []
        self.info: CheckpointInfo | None = read_info(self.path) if self.goes_on else None
        self.step = (self.info and self.info.step) or 0  # converted weights have none
        self.unread = not_read(self.base) if self.is_hf and self.base != Path(of_config) else []
        self.unread += other_tokenizers(settings, self.base)
        self.extra: dict[str, Any] = {}  # of this run's checkpoints
        if not self.is_hf and (not dist.is_initialized() or dist.get_rank() == 0):  # make doctor is no job
            self.warnings += _other_weights(model, opened, self.base, of_config)
        names = base_parameters(model)
        if settings.training.stage == "dpo" and not self.lora:  # what its log-probabilities are kept under
            first = self.info.extra.get(REFERENCE) if self.info and self.step else digest(opened, names)
            self.extra = {REFERENCE: first}
        if not self.lora:
            return
        run = AdapterRun(lora_spec(self.lora), str(self.base.absolute()), digest(opened, names))
        self.extra = run.to_extra()
        if self.info:
            run.check(self.info)
            self.sources.append(open_matching_checkpoint(model, self.path))
            self.notes.append(f"adapters from {self.path}")
        elif self.lora.adapter:
            folder = PeftFolder(self.lora.adapter, shapes_of(names.items()))
            _check_fit(folder, model, self.lora)
            self.sources.append(FiniteSource(folder, self.lora.adapter))
            self.notes += folder.notes
            learnt = (name for name in folder.specs if name.endswith("lora_B"))
            if not any(folder.read(name, TensorSlice.full(folder.specs[name].shape)).any() for name in learnt):
                self.warnings.append(f"{folder.folder}: every lora_B is zero, so these adapters have learnt nothing")
        else:
            self.sources.append(InitialAdapters(saved_parameters(model), settings.training.seed))

    def digest(self) -> str:
        """Of what `load` will load: the base, and the adapters if there are any."""
        names = [base_parameters(self.model), *([saved_parameters(self.model)] if self.lora else [])]
        return " ".join(map(digest, self.sources, names))

    def load(self, optimizer: Optimizer | None, progress: Callable[[int], object]) -> None:
        """Fill the model, sharded by now, and the optimizer; end the hold on checkpoints."""
        if self.is_hf:
            load_hf(self.model, self.base, progress)
        else:
            load_checkpoint(self.base, self.model, None if self.lora else optimizer, progress=progress)
        if self.lora and self.goes_on:
            load_checkpoint(self.path, self.model, optimizer, progress=progress)
        elif self.lora:
            fill(saved_parameters(self.model), self.sources[-1], progress)
        self.sources.clear()


def _other_weights(model: Qwen35, converted: TensorSource, base: Path, folder: str) -> list[str]:
    """A line if converted weights are not those of the model folder, which may have changed since.

    A run's own checkpoints always differ from it.
    """
    if base.name != RELEASE or not has_weights(Path(folder)):
        return []
    names = base_parameters(model)
    try:
        if digest(open_matching_folder(model, folder), names) == digest(converted, names):
            return []
    except CheckpointError:  # weights that nobody reads
        pass
    return [f"the weights in {base} are not those in {folder}; if that has changed since, make convert again"]


def _check_fit(folder: PeftFolder, model: Qwen35, lora: LoraSettings) -> None:
    wanted = shapes_of(saved_parameters(model).items())
    mismatch = Mismatch.between({name: spec.shape for name, spec in folder.specs.items()}, wanted)
    mismatch.raise_if_any(f"training.lora.adapter: {folder.folder} has other adapters than training.lora asks for")
    scale = lora_spec(lora).scale
    if not math.isclose(folder.scale, scale, rel_tol=1e-6):
        raise SettingError(
            f"training.lora.adapter: the adapters of {folder.folder} are scaled by {folder.scale:g}, and training.lora by "
            f"{scale:g}; set lora_alpha and use_rslora as {folder.folder}/adapter_config.json has them"
        )
