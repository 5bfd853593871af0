"""PEFT's adapter folders, read and written in the format of peft 0.21; no pickle is opened.

An adapter is a pair of matrices, A [r, in] and B [out, r]; scale * B @ A is added to a weight. The
model calls them `<module>.lora_A` and `<module>.lora_B`, a folder
`base_model.model.<module>.lora_A.weight`. Routed experts are a parameter to PEFT, not modules:
their stacked pairs are flat on disk, named after the module that holds the parameter.

    gate_up_lora_A [E, r, in]    experts.base_layer.lora_A.weight [E * r, in]
    gate_up_lora_B [E, out, r]   experts.base_layer.lora_B.weight [out, r * E]
    down_lora_A, down_lora_B     experts.lora_A.weight, experts.lora_B.weight, in the same way

Where gate_up_proj alone is adapted, its pair is the one without `base_layer`.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from qwen35.checkpoint import folders
from qwen35.checkpoint.errors import CheckpointError, Mismatch
from qwen35.checkpoint.hf_names import STACKED, pair_of, parameter_of
from qwen35.checkpoint.hf_read import CONFIG
from qwen35.checkpoint.hf_write import EXPORT_MANIFEST, WriteSummary
from qwen35.checkpoint.slices import TensorSlice, TensorSource, TensorSpec
from qwen35.checkpoint.tensor_file import read_header, read_slice
from qwen35.errors import read_object, shortened
from qwen35.model.lora import LoraSpec

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
VERSION = "0.21.2"  # of PEFT, whose format is written
ON_DISK = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
TEXT_ONLY = re.compile(r"^model\.(?=layers\.)")  # what transformers' text-only class calls the decoder
# keys that say what names and shapes of tensors say, or that only their trainer used
HARMLESS = """r rank_pattern target_modules exclude_modules layers_to_transform layers_pattern revision inference_mode
    peft_version auto_mapping megatron_core qalora_group_size eva_config ensure_weight_tying""".split()
ONLY_LORA = "is not read here, only plain LoRA of linear modules and routed experts"
EXCHANGED = "with A and B exchanged, as PEFT had those of experts up to 0.18 (write them anew with a later one)"

Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class PeftConfig:
    """The keys of adapter_config.json that decide what adapters compute, and two for messages."""

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "eva"] | None = True  # others change the base
    lora_alpha: Alpha = 8
    alpha_pattern: dict[Annotated[str, Field(pattern=r"^[\w.]+$")], Alpha] | None = None  # names, no patterns
    use_rslora: bool = False
    target_parameters: list[str] | None = None
    base_model_name_or_path: str | None = None
    lora_dropout: float = 0.0

    @staticmethod
    def read(folder: Path) -> "PeftConfig":
        """Raises CheckpointError for what is not understood and could change what adapters do."""
        file = folder / ADAPTER_CONFIG
        values = read_object(file, CheckpointError, "not there; the folder of an adapter holds one")
        known = {field.name for field in fields(PeftConfig)}
        for key, value in values.items():
            if key not in known and key not in HARMLESS and value and value != "none":
                raise CheckpointError(f"{file}: {key}: {shortened(json.dumps(value), 80)} {ONLY_LORA}")
        try:
            return TypeAdapter(PeftConfig).validate_python(values)
        except ValidationError as errors:
            error = errors.errors()[0]
            found, why = shortened(repr(error["input"]), 80), error["msg"]
            raise CheckpointError(f"{file}: {error['loc'][0]}: {found} {ONLY_LORA} ({why})") from None

    def scale(self, parameter: str, r: int) -> float:
        """Of the adapter of rank r of a parameter."""
        module = "." + parameter.removesuffix(".weight")
        alphas = (alpha for key, alpha in (self.alpha_pattern or {}).items() if module.endswith(f".{key}"))
        return next(alphas, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)

    def name_in_model(self, disk_name: str) -> str:
        """The model's name of a tensor on disk; '' for one that is no adapter."""
        match = ON_DISK.fullmatch(disk_name)
        if match is None:
            return ""
        module, side = TEXT_ONLY.sub("model.language_model.", match["module"], 1), match["side"]
        experts = module.removesuffix(".base_layer")
        if not experts.endswith(".experts"):
            return f"{module}.lora_{side}"
        targets = [f".{target}" for target in self.target_parameters or ()]
        has_down = any(f".{experts}.down_proj".endswith(target) for target in targets)
        return f"{experts}.{'down' if has_down and experts == module else 'gate_up'}_lora_{side}"


class PeftFolder:
    """A TensorSource over the adapters in a folder, under the model's names and shapes."""

    def __init__(self, folder: str | Path, shapes: Mapping[str, Sequence[int]]):
        """`shapes` are those of the base's parameters.

        Raises CheckpointError for what is not understood, in the folder's own names.
        """
        self.folder, self.file = Path(folder), Path(folder) / ADAPTER_FILE
        config = PeftConfig.read(self.folder)
        self.notes = [f"adapters from {folder}, whose base is {config.base_model_name_or_path or 'not named'}"]
        if config.lora_dropout:
            self.notes.append(f"{folder}: lora_dropout {config.lora_dropout} is not used, as adapters have none here")
        if not self.file.is_file():
            raise CheckpointError(f"{folder}: no {ADAPTER_FILE}; adapters are read from safetensors alone")
        self._entries = read_header(self.file)
        self._disk_names: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        mismatch, scales = Mismatch(), dict[float, str]()
        for disk_name, entry in self._entries.items():
            name = config.name_in_model(disk_name)
            parameter, stored = parameter_of(name), entry.spec.shape
            base = shapes.get(parameter, ())
            is_known = len(base) == 2 + bool(STACKED.fullmatch(parameter)) and entry.spec.dtype.is_floating_point
            if not is_known or len(stored) != 2:
                mismatch.add("not of an adapter of this model", disk_name)
            elif isinstance(shape := _shape_in_model(name, stored, base), str):
                mismatch.add(shape, disk_name)
            else:
                self._disk_names[name], self.specs[name] = disk_name, TensorSpec(shape, entry.spec.dtype)
                r = shape[-2 if name.endswith("A") else -1]
                scales.setdefault(round(config.scale(parameter, r), 9), disk_name)
        for name, disk_name in self._disk_names.items():
            if any(other not in self.specs for other in pair_of(parameter_of(name))):
                mismatch.add("without the other of its pair", disk_name)
        mismatch.raise_if_any(f"{self.file}")
        if len(scales) != 1:
            several = " and ".join(f"{scale:g} in {name}" for scale, name in scales.items())
            raise CheckpointError(
                f"{self.file}: " + (f"scales of {several}; here all adapters have one" if several else "no adapters")
            )
        (self.scale,) = scales

    def read(self, name: str, region: TensorSlice) -> Tensor:
        """Experts lie side by side in each row of their B, so all are read for one."""
        entry, shape = self._entries[self._disk_names[name]], self.specs[name].shape
        if len(shape) == 2:
            return read_slice(self.file, entry, region)
        (expert, row, column), (count, rows, columns) = region.offsets, region.lengths
        if name.endswith("A"):
            flat = read_slice(self.file, entry, TensorSlice((expert * shape[1], column), (count * shape[1], columns)))
            return flat.view(count, shape[1], columns)[:, row : row + rows]
        flat = read_slice(self.file, entry, TensorSlice((row, 0), (rows, shape[2] * shape[0])))
        stacked = flat.view(rows, shape[2], shape[0]).permute(2, 0, 1)
        return stacked[expert : expert + count, :, column : column + columns]


def _shape_in_model(name: str, stored: Sequence[int], base: Sequence[int]) -> tuple[int, ...] | str:
    """The shape of an adapter of a parameter of shape `base`, or what is wrong with it."""
    *stack, rows, columns = base
    is_a, experts = name.endswith("A"), math.prod(stack)
    (r, width), (own, other) = (stored, (columns, rows)) if is_a else (stored[::-1], (rows, columns))
    if stack and width == other != own:
        return EXCHANGED
    if width != own or r % experts or not r:
        rank = f"{experts} x r" if stack else "r"
        return f"of shape {list(stored)} instead of {f'[{rank}, {columns}]' if is_a else f'[{rows}, {rank}]'}"
    return (*stack, r // experts, columns) if is_a else (*stack, rows, r // experts)


def write_peft(
    adapters: TensorSource, spec: LoraSpec, shapes: Mapping[str, Sequence[int]], base: str, folder: str | Path
) -> WriteSummary:
    """Write adapters as PEFT does, all in memory at once. `shapes` are the base's.

    `folder` is replaced if it is empty or was written by this program. Raises CheckpointError.
    """
    out = Path(folder)
    if (out / CONFIG).exists():
        raise CheckpointError(f"{out} holds a model; choose another folder for the adapter")
    adapted = {parameter_of(name) for name in adapters.specs}
    experts = {name for name in adapted if STACKED.fullmatch(name)}
    tensors = {}
    for name, tensor_spec in adapters.specs.items():
        matrix, parameter = adapters.read(name, TensorSlice.full(tensor_spec.shape)), parameter_of(name)
        module = parameter.removesuffix(".weight")
        if parameter in experts:
            matrix = matrix.flatten(0, 1) if name.endswith("A") else matrix.permute(1, 2, 0).flatten(1)
            module, _, stack = parameter.rpartition(".")
            module += ".base_layer" * (stack == "gate_up_proj" and f"{module}.down_proj" in experts)
        tensors[f"base_model.model.{module}.lora_{name[-1]}.weight"] = matrix.contiguous()
    known = [name for name in shapes if not name.startswith("mtp.")]  # transformers has no such modules
    modules = [name.removesuffix(".weight") for name in known if name.endswith(".weight")]
    targets = _short(experts, filter(STACKED.fullmatch, known), parts=3)
    own = targets if spec.expert_r != spec.r else []
    alpha = spec.scale * (math.sqrt(spec.expert_r) if spec.use_rslora else spec.expert_r)
    config = PeftConfig(
        "LORA", None, True, spec.alpha, dict.fromkeys(own, alpha), spec.use_rslora, targets or None, base, 0.0
    )
    values = asdict(config) | {
        "r": spec.r,
        "rank_pattern": dict.fromkeys(own, spec.expert_r),
        "target_modules": _short({n.removesuffix(".weight") for n in adapted - experts}, modules, parts=1),
        "bias": "none",
        "inference_mode": True,
        "peft_version": VERSION,
    }
    content: dict[str, Any] = {}
    with folders.new_folder(out, EXPORT_MANIFEST, content) as temporary:
        save_file(tensors, temporary / ADAPTER_FILE, {"format": "pt"})
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        content |= {"tensors": len(tensors), "files": list(folders.file_sizes(temporary))}
    return WriteSummary(len(tensors), sum(t.nbytes for t in tensors.values()), out)


def _short(adapted: Collection[str], all_names: Iterable[str], parts: int) -> list[str]:
    """Their last `parts` parts where these select exactly the adapted ones, else full names."""
    tails: dict[str, set[str]] = {}
    for name in all_names:
        tails.setdefault(".".join(name.split(".")[-parts:]), set()).add(name)
    found: set[str] = set()
    for tail, names in tails.items():
        chosen = names & set(adapted)
        found |= {tail} if chosen == names else chosen
    return sorted(found)
