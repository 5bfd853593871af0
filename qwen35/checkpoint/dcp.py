"""Training checkpoints in the format of torch.distributed.checkpoint (DCP): save and resume.

A checkpoint holds `model.<parameter>` in the parameters' dtypes, `optimizer.<state>.<parameter>`
(exp_avg, exp_avg_sq, step) for the parameters that have such state, and small extras as JSON. Of a
model with adapters it holds these alone: the base never changes.
Everything works with and without torch.distributed.
"""

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from qwen35.checkpoint.dcp_folder import damaged, read_file, read_manifest, resolve_load
from qwen35.checkpoint.dcp_source import MODEL, OPTIMIZER, DCPSource
from qwen35.checkpoint.errors import CheckpointError, Mismatch
from qwen35.checkpoint.hf_names import (
    HEAD,
    base_parameters,
    may_be_skipped,
    missing_mtp_hint,
    saved_parameters,
    shapes_of,
)
from qwen35.checkpoint.hf_read import check_tied
from qwen35.checkpoint.slices import FiniteSource, LocalShard, TensorSlice, TensorSource, fill
from qwen35.checkpoint.tensor_file import CODES, DTYPES, raw_bytes
from qwen35.device import HOST, host_buffer, synchronize
from qwen35.model import ModelConfig, Qwen35
from qwen35.model.config import check_same
from qwen35.model.lora import is_adapter

EXTRA, RANK_EXTRA = "extra.json", "rank_{:05}.json"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds besides weights and optimizer state."""

    path: Path
    step: int | None  # None: converted weights
    world_size: int  # of the run that wrote it
    has_optimizer: bool
    extra: dict[str, Any]  # the same for all ranks; of converted weights only the config
    rank_extra: dict[str, Any] | None  # this rank's; None if none was saved, or with another world size


def training_state(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """The tensors to save, by name: the model's and the optimizer's own, not copies."""
    parameters = saved_parameters(model)
    state = {MODEL + name: p.detach() for name, p in parameters.items()}
    if optimizer is not None:
        if any(group.get("on_host") for group in optimizer.param_groups):
            synchronize({p.device for p in parameters.values()})  # the last step may still be copying moments
        names = {id(p): name for name, p in parameters.items()}
        for parameter, values in optimizer.state.items():
            if id(parameter) not in names:
                raise CheckpointError("the optimizer holds a parameter that is not the model's")
            for key, value in values.items():
                state[f"{OPTIMIZER}{key}.{names[id(parameter)]}"] = value.detach()
    return state


def write_shards(
    folder: str | Path,
    step: int,
    shards: Mapping[str, LocalShard],
    extra: Mapping[str, Any] | None = None,
    rank_extra: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `<folder>/iter_<step>`, on all ranks together, and return it once it is complete.

    `extra` is the same on all ranks (rank 0's is written), `rank_extra` belongs to each rank
    (random states); both consist of JSON values, tuples and small tensors. `group`: the ranks that
    take part, by default all. Raises CheckpointError on all ranks if one fails; older checkpoints
    are not touched.
    """
    from qwen35.checkpoint.dcp_write import shard_planner, write_checkpoint  # slow to import, and readers need it not

    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)

    def write_rest(temporary: Path) -> None:
        if rank_extra is not None:
            (temporary / RANK_EXTRA.format(rank)).write_text(json.dumps(encode(dict(rank_extra))), encoding="utf-8")
        if rank == 0:
            write_extra(temporary, extra or {})

    return write_checkpoint(Path(folder), step, shard_planner(shards), write_rest, group, world_size)


def write_extra(folder: Path, extra: Mapping[str, Any]) -> None:
    (folder / EXTRA).write_text(json.dumps(encode(dict(extra))), encoding="utf-8")


def read_info(checkpoint: Path, group: dist.ProcessGroup | None = None) -> CheckpointInfo:
    """Read what a checkpoint holds besides tensors. Raises CheckpointError if it is damaged."""
    manifest = read_manifest(checkpoint)
    rank, world_size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    rank_file, files = RANK_EXTRA.format(rank), manifest["files"]
    if manifest["step"] is not None and EXTRA not in files:
        raise damaged(checkpoint, EXTRA, "is missing")
    has_rank_files = any(name.startswith(RANK_EXTRA.partition("{")[0]) for name in files)
    expects_rank_file = has_rank_files and manifest["world_size"] == world_size
    if expects_rank_file and rank_file not in files:
        raise damaged(checkpoint, rank_file, f"is missing, though another of the {world_size} ranks has one")
    return CheckpointInfo(
        path=checkpoint,
        step=manifest["step"],
        world_size=manifest["world_size"],
        has_optimizer=bool(DCPSource(checkpoint, OPTIMIZER).specs),
        extra=_read_extra(checkpoint, EXTRA, manifest) if EXTRA in files else {},
        rank_extra=_read_extra(checkpoint, rank_file, manifest) if expects_rank_file else None,
    )


def _read_extra(checkpoint: Path, name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    content = read_file(checkpoint, name, manifest)
    try:
        return dict(decode(json.loads(content)).items())
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError):  # RecursionError is a RuntimeError
        raise damaged(checkpoint, name, "is damaged") from None


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    group: dist.ProcessGroup | None = None,
    progress: Callable[[int], object] | None = None,
) -> CheckpointInfo:
    """Load the checkpoint that `resolve_load(path)` finds into a model, and into its optimizer.

    The model may be plain or sharded in any way. Values are cast to the parameters' dtypes. Each
    rank reads its own part, without communication. Of a model with adapters either these are
    loaded, or all else, as the checkpoint has it. Optimizer state is created for the parameters
    that the optimizer holds and that have some in the checkpoint; converted weights have none, and
    leave the optimizer as it is. `mtp.*` is skipped for a model without that layer. `progress` is
    called with the bytes read. Raises one CheckpointError for all names and shapes that do not fit.
    """
    checkpoint = resolve_load(path)
    info = read_info(checkpoint, group)
    source = open_matching_checkpoint(model, checkpoint)
    parameters = _parameters_in(source, model)
    if optimizer is not None and info.has_optimizer:
        _load_optimizer(optimizer, parameters, DCPSource(checkpoint, OPTIMIZER), progress)
    fill(parameters, FiniteSource(source, checkpoint), progress)
    return info


def check_config(checkpoint: Path, config: ModelConfig) -> None:
    """Raises ConfigError if a checkpoint is of another model; older ones do not say of which."""
    was = read_info(checkpoint).extra.get("model")
    check_same(checkpoint, was if isinstance(was, dict) else {}, config)


def open_matching_checkpoint(model: nn.Module, checkpoint: Path) -> DCPSource:
    """A checkpoint whose config, names and shapes must fit the model, or its adapters.

    Raises CheckpointError, ConfigError.
    """
    source = DCPSource(checkpoint)
    check_fit(source, shapes_of(_parameters_in(source, model).items()), checkpoint)
    if isinstance(model, Qwen35):
        check_config(checkpoint, model.config)
    return source


def check_fit(source: TensorSource, shapes: Mapping[str, tuple[int, ...]], checkpoint: Path) -> None:
    """Raises CheckpointError unless a checkpoint holds tensors of these shapes, tied alike."""
    stored = {
        name: spec.shape for name, spec in source.specs.items() if name in shapes or not may_be_skipped(name, shapes)
    }
    mismatch = Mismatch.between(stored, shapes)
    mismatch.hints = missing_mtp_hint(shapes, source.specs)
    mismatch.raise_if_any(f"{checkpoint} does not fit the model")
    if HEAD not in shapes:
        check_tied(source, checkpoint)


def _parameters_in(source: DCPSource, model: nn.Module) -> dict[str, Tensor]:
    """The parameters that a checkpoint is for: the adapters, or all but these."""
    if not any(map(is_adapter, source.specs)):
        return base_parameters(model)
    if not any(map(is_adapter, saved := saved_parameters(model))):
        raise CheckpointError(
            f"{source.checkpoint} holds the adapters of a LoRA run, not a model: set training.lora as that run had it, or "
            "train the merged weights: make export, then training.init_from_hf_path and another save"
        )
    return saved


def _load_optimizer(
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    states: DCPSource,
    progress: Callable[[int], object] | None,
) -> None:
    """Replace the optimizer's state; parameters with none in the checkpoint end up with none."""
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    mismatch = Mismatch()
    fresh: dict[str, dict[str, Tensor]] = {}
    for full_name, spec in states.specs.items():
        key, _, name = full_name.partition(".")
        parameter = parameters.get(name)
        if parameter is None:
            if not may_be_skipped(name, parameters):
                mismatch.add("not of this model", OPTIMIZER + full_name)
            continue
        group = group_of.get(id(parameter))
        if group is None:
            continue  # it was frozen after the checkpoint was written
        if not spec.shape:
            on_device = group.get("fused") or group.get("capturable")
            device = parameter.device if on_device else HOST
            fresh.setdefault(name, {})[key] = states.read(full_name, TensorSlice((), ())).to(device)
        else:
            mismatch.compare(OPTIMIZER + full_name, spec.shape, parameter.shape)
            allocate = host_buffer if group.get("on_host") else partial(torch.zeros_like, requires_grad=False)
            fresh.setdefault(name, {})[key] = allocate(parameter, dtype=spec.dtype)
    mismatch.raise_if_any(f"the optimizer state in {states.checkpoint} does not fit the model")
    for name, values in fresh.items():
        fill({f"{key}.{name}": tensor for key, tensor in values.items() if tensor.dim()}, states, progress)
    optimizer.state.clear()
    for name, values in fresh.items():
        optimizer.state[parameters[name]] = values


def encode(value: Any, path: str = "extra") -> Any:
    """Turn the extras of a checkpoint (random states, counters) into JSON, which cannot run code.

    They are numbers, strings, lists, tuples, tensors, and dicts with string keys. Raises TypeError
    for anything else, naming its path.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        data = raw_bytes(value.detach().cpu().contiguous()).tobytes()
        shape = list(value.shape)
        return {"$tensor": base64.b64encode(data).decode(), "dtype": CODES[value.dtype], "shape": shape}
    if isinstance(value, list):
        return [encode(v, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [encode(v, f"{path}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(k, str) and not k.startswith("$") for k in value):
        return {k: encode(v, f"{path}.{k}") for k, v in value.items()}
    raise TypeError(f"{path}: {type(value).__name__} cannot be saved in a checkpoint")


def decode(value: Any) -> Any:
    """The exact inverse of `encode`: floats, tuples and dtypes of tensors are preserved."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tuple" in value:
        return tuple(decode(v) for v in value["$tuple"])
    if "$tensor" in value:
        data = bytearray(base64.b64decode(value["$tensor"]))
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return flat.view(DTYPES[value["dtype"]]).view(value["shape"])
    return {k: decode(v) for k, v in value.items()}
