"""A base with adapters merged into it, slice by slice, and which base a run's adapters belong to.

A LoRA run's checkpoints hold its adapters alone. What they are added to is in `extra.json`: the
path of the base, and a digest of it, by which another base is recognized.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from qwen35.checkpoint.dcp import EXTRA, CheckpointInfo, check_config, open_matching_checkpoint, read_info
from qwen35.checkpoint.dcp_folder import METADATA, damaged
from qwen35.checkpoint.dcp_source import DCPSource
from qwen35.checkpoint.errors import CheckpointError, Mismatch
from qwen35.checkpoint.hf import open_matching_folder
from qwen35.checkpoint.hf_names import EMBEDDING, HEAD, base_parameters, pair_of
from qwen35.checkpoint.slices import TensorSlice, TensorSource, pieces
from qwen35.checkpoint.tensor_file import raw_bytes
from qwen35.device import WithoutInit
from qwen35.errors import UserError
from qwen35.model import Qwen35, load_config
from qwen35.model.lora import LoraSpec, is_adapter

DECISIVE = ("r", "alpha", "expert_r", "use_rslora")  # fields of LoraSpec; the others only select, as the names say
SAMPLED = 1024  # values, or rows of an embedding, that a digest covers at an end of a tensor


class Merged:
    """A TensorSource: the base's tensors, scale * B @ A added to those that have adapters.

    The sum is made in fp64 and rounded once, to the base's dtype, so that it does not show how a
    tensor was cut. All other tensors have the base's own bytes. `changed` are those that were read
    and are not the base's after rounding.
    """

    def __init__(self, base: TensorSource, adapters: TensorSource, scale: float):
        self.base, self.adapters, self.scale, self.specs = base, adapters, scale, base.specs
        self.changed: set[str] = set()
        pairs = {name: pair_of(name) for name in base.specs}
        self.pairs = {name: pair for name, pair in pairs.items() if pair[0] in adapters.specs}
        wanted: dict[str, tuple[int, ...]] = {}
        for name, (a, b) in self.pairs.items():
            *stack, rows, columns = base.specs[name].shape
            r = adapters.specs[a].shape[-2]
            wanted |= {a: (*stack, r, columns), b: (*stack, rows, r)}
        stored = {name: spec.shape for name, spec in adapters.specs.items()}
        Mismatch.between(stored, wanted).raise_if_any("the adapters do not fit the base")

    def read(self, name: str, region: TensorSlice) -> Tensor:
        values = self.base.read(name, region)
        if name not in self.pairs:
            return values
        a, b = self.pairs[name]
        (*first, row, column), (*count, rows, columns) = region.offsets, region.lengths
        r = self.adapters.specs[a].shape[-2]
        left = self.adapters.read(b, TensorSlice((*first, row, 0), (*count, rows, r))).double()
        right = self.adapters.read(a, TensorSlice((*first, 0, column), (*count, r, columns))).double()
        merged = (values + self.scale * (left @ right)).to(values.dtype)
        if not torch.equal(merged, values):
            self.changed.add(name)
        return merged


@dataclass(frozen=True)
class AdapterRun:
    """What a LoRA run's checkpoints say of it, as `lora` in extra.json."""

    spec: LoraSpec
    base: str  # the folder or checkpoint with the base's weights
    digest: str

    def to_extra(self) -> dict[str, Any]:
        return {"lora": asdict(self)}

    def check(self, info: CheckpointInfo) -> None:
        """Raises CheckpointError unless this run may go on from a checkpoint's adapters."""
        before = AdapterRun.of(info)
        was, now = ({n: v for n, v in asdict(run.spec).items() if n in DECISIVE} for run in (before, self))
        if changed := "; ".join(f"{name}: {was[name]} -> {now[name]}" for name in was if was[name] != now[name]):
            raise CheckpointError(f"{info.path} holds adapters of other training.lora ({changed}); set it as it was")
        if before.digest != self.digest:
            raise CheckpointError(
                f"{info.path} holds adapters of {before.base}, and the weights in {self.base} are others; name the base that "
                "they were trained on, or start anew in another training.save"
            )

    @staticmethod
    def of(info: CheckpointInfo) -> "AdapterRun":
        """Raises CheckpointError if the checkpoint does not say it."""
        try:
            return TypeAdapter(AdapterRun).validate_python(info.extra.get("lora"))
        except ValidationError:
            raise damaged(info.path, EXTRA, "does not say which base its adapters belong to") from None


def holds_adapters(source: TensorSource) -> bool:
    return any(map(is_adapter, source.specs))


def digest(source: TensorSource, names: Iterable[str]) -> str:
    """Of names, shapes and some values of a base's tensors, whatever dtype they are stored in.

    The values are the first and the last of each tensor (of stacked experts, those of the first and
    the last), and of embedding and head the last rows, where tokens are added.
    """
    total = hashlib.sha256()
    for name in sorted(names):
        shape = source.specs[name].shape
        total.update(f"{name} {list(shape)}\n".encode())
        for region in _sampled(name, shape):
            total.update(raw_bytes(source.read(name, region).float().contiguous()))
    return total.hexdigest()


def _sampled(name: str, shape: tuple[int, ...]) -> Iterator[TensorSlice]:
    yield next(iter(pieces(TensorSlice.full(shape), 1, SAMPLED)))
    *lead, last = shape
    if name in (EMBEDDING, HEAD):
        rows = min(shape[0], SAMPLED)
        yield TensorSlice((shape[0] - rows, 0), (rows, last))
    elif all(shape):
        count = min(last, SAMPLED)
        yield TensorSlice((*(n - 1 for n in lead), last - count), (*(1 for _ in lead), count))


def open_base(model: Qwen35, path: Path) -> TensorSource:
    """A model folder or DCP checkpoint that fits the model. Raises CheckpointError, ConfigError."""
    return (open_matching_checkpoint if (path / METADATA).is_file() else open_matching_folder)(model, path)


def open_weights(checkpoint: Path, origin: Path) -> TensorSource:
    """The weights in a DCP checkpoint; those of a LoRA run merged into its base.

    origin: the model folder with their config.json. It is the base if it has its weights, else the
    base is where it was when the run trained. Raises CheckpointError, ConfigError.
    """
    source, config = DCPSource(checkpoint), load_config(origin)
    check_config(checkpoint, config)
    if not holds_adapters(source):
        return source
    run = AdapterRun.of(read_info(checkpoint))
    with torch.device("meta"), WithoutInit():
        model = Qwen35(config)
    reasons = []
    for path in dict.fromkeys((origin, Path(run.base))):
        try:
            base = open_base(model, path)
        except UserError as error:
            reasons.append(str(error))
            continue
        if digest(base, base_parameters(model)) == run.digest:
            return Merged(base, source, run.spec.scale)
        reasons.append(f"{path} holds other weights")
    raise CheckpointError(f"{checkpoint} holds adapters, and their base is not here: {'; '.join(reasons)}")
