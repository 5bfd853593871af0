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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, StrictInt, TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from qwen35.checkpoint import folders
from qwen35.checkpoint.errors import CheckpointError, Mismatch, abbreviate
from qwen35.checkpoint.hf_names import STACKED, pair_of, parameter_of, text_only_name
from qwen35.checkpoint.hf_read import CONFIG
from qwen35.checkpoint.hf_write import EXPORT_MANIFEST, OF_TOKENIZER, WriteSummary
from qwen35.checkpoint.slices import TensorSlice, TensorSource, TensorSpec
from qwen35.checkpoint.tensor_file import read_header, read_slice
from qwen35.errors import read_object, shortened
from qwen35.model.lora import LoraSpec

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
VERSION = "0.21.2"  # of PEFT, whose format is written
ON_DISK = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
TEXT_ONLY = re.compile(r"^model\.(?=layers\.)")  # what transformers' text-only class calls the decoder
# keys that say what names of tensors say, or that only their trainer used
HARMLESS = """target_modules exclude_modules layers_to_transform layers_pattern revision inference_mode auto_mapping
    megatron_core qalora_group_size eva_config ensure_weight_tying""".split()
OTHER_WEIGHTS = re.compile(r".+\.(safetensors|bin|pt|pth|ckpt|gguf|npz|pkl)")
# files of a trainer and of PEFT that hold no weights, or the adapters' in another form
HARMLESS_FILES = re.compile(
    r"adapter_model\.bin|training_args\.(bin|json)|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth|\..*"
    r"|(README|LICENSE|NOTICE).*|(trainer_state|(all|train|eval)_results)\.json|trainer_log\.jsonl"
)
ONLY_LORA = "is not read here, only plain LoRA of linear modules and routed experts"
EXCHANGED = "with A and B exchanged, as PEFT had those of experts up to 0.18 (write them anew with a later one)"

T = TypeVar("T")
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rank = Annotated[StrictInt, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[\w.]+$")]  # no pattern


@dataclass(frozen=True)
class PeftConfig:
    """The keys of adapter_config.json that decide what adapters compute, and two for messages."""

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    init_lora_weights: bool | Literal["gaussian", "orthogonal", "eva"] | None = True  # others change the base
    r: Rank = 8
    rank_pattern: dict[Name, Rank] | None = None
    lora_alpha: Alpha = 8
    alpha_pattern: dict[Name, Alpha] | None = None
    use_rslora: bool = False
    target_parameters: list[str] | None = None
    base_model_name_or_path: str | None = None
    lora_dropout: float = 0.0
    peft_version: str | None = None  # releases up to 0.17 do not write it

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

    def rank(self, module: str) -> int:
        """Of the adapter of a module, or of the experts' weight, of this name on disk."""
        return _of(module, self.rank_pattern, self.r)

    def scale(self, module: str) -> float:
        r = self.rank(module)
        return _of(module, self.alpha_pattern, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)

    @property
    def exchanges_experts(self) -> bool:
        """Whether this PEFT had A and B of experts exchanged, as was the case up to 0.18."""
        version = [int(part) for part in re.findall(r"\d+", self.peft_version or "")[:2]]
        return version < [0, 19]

    def name_in_model(self, disk_name: str) -> str:
        """The model's name of a tensor on disk; '' for one that is no adapter."""
        match = ON_DISK.fullmatch(disk_name)
        if match is None:
            return ""
        module, side = TEXT_ONLY.sub("model.language_model.", match["module"], 1), match["side"]
        experts, on_disk = (name.removesuffix(".base_layer") for name in (module, match["module"]))
        if not experts.endswith(".experts"):
            return f"{module}.lora_{side}"
        targets = [f".{target}" for target in self.target_parameters or ()]
        has_down = any(f".{on_disk}.down_proj".endswith(target) for target in targets)
        return f"{experts}.{'down' if has_down and experts == module else 'gate_up'}_lora_{side}"


def _of(module: str, values: Mapping[str, T] | None, default: T) -> T:
    """The value of the first name in a pattern of PEFT's that is an end of a module's name."""
    found = (value for name, value in (values or {}).items() if f".{module}".endswith(f".{name}"))
    return next(found, default)


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
        self.notes += _other_files(self.folder)
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
                continue
            if name in self.specs:
                mismatch.add("there twice, under two names", disk_name)
                continue
            shape = _shape_in_model(name, stored, base, config.exchanges_experts)
            if isinstance(shape, str):
                mismatch.add(shape, disk_name)
                continue
            self._disk_names[name], self.specs[name] = disk_name, TensorSpec(shape, entry.spec.dtype)
            module, r = _module_on_disk(disk_name, parameter), shape[-2 if name.endswith("A") else -1]
            if r != config.rank(module):
                mismatch.add(f"of rank {r}, while {ADAPTER_CONFIG} says {config.rank(module)}", disk_name)
            scales.setdefault(round(config.scale(module), 9), disk_name)
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


def _other_files(folder: Path) -> list[str]:
    """Lines about what else lies in an adapter's folder. Raises CheckpointError for weights."""
    others = [p for p in sorted(folder.iterdir()) if not HARMLESS_FILES.fullmatch(p.name)]
    others = [p for p in others if p.name not in (ADAPTER_CONFIG, ADAPTER_FILE)]
    if weights := [p.name for p in others if p.is_file() and OTHER_WEIGHTS.fullmatch(p.name)]:
        raise CheckpointError(
            f"{folder}: weights beside {ADAPTER_FILE} that are not read: {abbreviate(weights)}; if they were trained with the "
            "adapter, merge both into the model first, else move them away"
        )
    names = [f"{p.name}/" if p.is_dir() else p.name for p in others]
    its_own = "; the tokenizer and the template are those of the recipe" * any(name in OF_TOKENIZER for name in names)
    return [f"{folder}: not read: {abbreviate(names)}{its_own}"] if names else []


def _module_on_disk(disk_name: str, parameter: str) -> str:
    """The name that PEFT compares with its patterns: that in the class which it wrapped."""
    module = parameter.removesuffix(".weight")
    is_text_only = TEXT_ONLY.match(disk_name.removeprefix("base_model.model."))
    return text_only_name(module) if is_text_only else module


def _shape_in_model(name: str, stored: Sequence[int], base: Sequence[int], exchanges: bool) -> tuple[int, ...] | str:
    """The shape of an adapter of a parameter of shape `base`, or what is wrong with it.

    exchanges: whether A and B of square experts are exchanged, which their shapes do not show.
    """
    *stack, rows, columns = base
    is_a, experts = name.endswith("A"), math.prod(stack)
    (r, width), (own, other) = (stored, (columns, rows)) if is_a else (stored[::-1], (rows, columns))
    if stack and width == other and (own != other or exchanges):
        return EXCHANGED
    if width != own or r % experts or not r:
        rank = f"{experts} x r" if stack else "r"
        return f"of shape {list(stored)} instead of {f'[{rank}, {columns}]' if is_a else f'[{rows}, {rank}]'}"
    return (*stack, r // experts, columns) if is_a else (*stack, rows, r // experts)


def write_peft(
    adapters: TensorSource,
    spec: LoraSpec,
    shapes: Mapping[str, Sequence[int]],
    base: str,
    folder: str | Path,
    is_text_only: bool = False,
) -> WriteSummary:
    """Write adapters as PEFT does, all in memory at once. `shapes` are the base's.

    `folder` is replaced if it is empty or was written by this program. Raises CheckpointError.
    """
    out = Path(folder)
    if (out / CONFIG).exists():
        raise CheckpointError(f"{out} holds a model; choose another folder for the adapter")
    name_on_disk: Callable[[str], str] = text_only_name if is_text_only else str
    adapted = {name_on_disk(parameter_of(name)) for name in adapters.specs}
    experts = {name for name in adapted if STACKED.fullmatch(name)}
    tensors = {}
    for name, tensor_spec in adapters.specs.items():
        matrix = adapters.read(name, TensorSlice.full(tensor_spec.shape))
        parameter = name_on_disk(parameter_of(name))
        module = parameter.removesuffix(".weight")
        if parameter in experts:
            matrix = matrix.flatten(0, 1) if name.endswith("A") else matrix.permute(1, 2, 0).flatten(1)
            module, _, stack = parameter.rpartition(".")
            module += ".base_layer" * (stack == "gate_up_proj" and f"{module}.down_proj" in experts)
        tensors[f"base_model.model.{module}.lora_{name[-1]}.weight"] = matrix.contiguous()
    known = [name_on_disk(name) for name in shapes if not name.startswith("mtp.")]  # transformers has no such modules
    modules = [name.removesuffix(".weight") for name in known if name.endswith(".weight")]
    targets = _short(experts, filter(STACKED.fullmatch, known), parts=3)
    own = targets if spec.expert_r != spec.r else []
    alpha = spec.scale * (math.sqrt(spec.expert_r) if spec.use_rslora else spec.expert_r)
    config = PeftConfig(
        "LORA",
        r=spec.r,
        rank_pattern=dict.fromkeys(own, spec.expert_r),
        lora_alpha=spec.alpha,
        alpha_pattern=dict.fromkeys(own, alpha),
        use_rslora=spec.use_rslora,
        target_parameters=targets or None,
        base_model_name_or_path=base,
        peft_version=VERSION,
    )
    target_modules = _short({n.removesuffix(".weight") for n in adapted - experts}, modules, parts=1)
    values = asdict(config) | {"target_modules": target_modules, "bias": "none", "inference_mode": True}
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
