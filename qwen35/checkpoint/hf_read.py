"""Reading a Hugging Face folder, under the names on disk (HFFolder) and the model's (HFSource)."""

import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35.checkpoint.errors import CheckpointError, Mismatch, abbreviate
from qwen35.checkpoint.hf_names import EMBEDDING, HEAD, first_on_disk, mappings_of, may_be_skipped, missing_mtp_hint
from qwen35.checkpoint.slices import TensorSlice, TensorSource, TensorSpec, pieces
from qwen35.checkpoint.tensor_file import Entry, read_header, read_slice
from qwen35.errors import read_object
from qwen35.model.config import is_tied
from qwen35.model.config_keys import ConfigError, refuse_quantized

CONFIG = "config.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTIZED = re.compile(r"(hf_quant_config|quant(ize)?_config|quant_model_description.*)\.json")
MERGE = "merge it first (peft: merge_and_unload, then save_pretrained) and bring what that saves"
TOWER = "model.visual."
WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
UNFINISHED = (".aria2", ".part", ".incomplete")  # beside a file that is being downloaded
OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"}
PEFT_NAME = re.compile(r"^base_model\.model\.|\.lora_|\.base_layer\.")
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # others mean quantized weights


class HFFolder:
    """The tensors of a folder as stored: in one safetensors file, or several and an index."""

    def __init__(self, folder: str | Path):
        """Reads index and headers.

        Raises CheckpointError if a file is missing or broken, or if index and files differ.
        Adapters and quantized weights are refused with CheckpointError or ConfigError.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        refuse_unsupported(self.folder)
        names, weight_map = weight_files(self.folder)
        self.has_index = weight_map is not None
        self.files: dict[str, dict[str, Entry]] = {file: read_header(self.folder / file) for file in names}
        self.file_of: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        mismatch = Mismatch()
        for file, entries in self.files.items():
            for name, entry in entries.items():
                if name in self.file_of:
                    mismatch.add(f"in both {self.file_of[name]} and {file}", name)
                if entry.spec.dtype not in FLOAT_DTYPES:
                    mismatch.add(f"of {entry.spec.dtype}, as quantized weights are", name)
                self.file_of[name], self.specs[name] = file, entry.spec
        if adapted := [name for name in self.specs if PEFT_NAME.search(name)]:
            raise CheckpointError(
                f"{folder}: {len(adapted)} tensors have names that PEFT gives ({abbreviate(adapted)}): an adapter that "
                f"is not merged into the weights; {MERGE}"
            )
        if weight_map is not None:
            mismatch.add("missing", *(n for n, file in weight_map.items() if n not in self.files[file]))
            mismatch.add(f"not in {WEIGHTS_INDEX}", *(n for n in self.specs if n not in weight_map))
        mismatch.raise_if_any(f"{self.folder}")

    @property
    def is_tied(self) -> bool:
        """Whether config.json ties the output head to the embedding."""
        return is_tied(config_of(self.folder))

    def read(self, name: str, region: TensorSlice | None = None) -> Tensor:
        """A tensor on disk, or one region of it, in its stored dtype."""
        entry = self.files[self.file_of[name]][name]
        return read_slice(self.folder / self.file_of[name], entry, region or TensorSlice.full(entry.spec.shape))


class HFSource:
    """A TensorSource over a folder of any layout: the model's names and layouts."""

    def __init__(self, folder: HFFolder, shapes: Mapping[str, Sequence[int]], headline: str):
        """`shapes` are those of the model's parameters.

        Raises one CheckpointError for all that does not fit, in the folder's own names. `mtp.*` may
        be surplus if the model has no such layer, and `lm_head.weight` if its weights are tied
        (`check_tied` compares it with the embedding).
        """
        self.folder = folder
        self.mappings = {name: mappings_of(name, shape, folder.specs) for name, shape in shapes.items()}
        stored = {n: spec.shape for n, spec in folder.specs.items()}
        wanted = {m.disk_name: m.disk_shape for mappings in self.mappings.values() for m in mappings}
        mismatch = Mismatch.between(
            {n: s for n, s in stored.items() if n in wanted or not may_be_skipped(n, shapes)}, wanted
        )
        if HEAD in mismatch.faults["missing"]:
            hint = "if the head is the embedding, set tie_word_embeddings: true at the top level of config.json"
            mismatch.hints.append(hint)
        if any(name.startswith(TOWER) for name in stored) and not any(name.startswith(TOWER) for name in shapes):
            hint = "config.json is of a text-only model, and the weights have a vision tower; take the one that belongs to them"
            mismatch.hints.append(hint)
        mismatch.hints += missing_mtp_hint(shapes, stored)
        for name, mappings in self.mappings.items():
            dtypes = {str(folder.specs[m.disk_name].dtype) for m in mappings if m.disk_name in stored}
            if len(dtypes) > 1:
                mismatch.add(f"made of tensors of {' and '.join(sorted(dtypes))}", name)
        mismatch.raise_if_any(headline)
        dtype_of = {name: folder.specs[mappings[0].disk_name].dtype for name, mappings in self.mappings.items()}
        self.specs = {name: TensorSpec(tuple(shape), dtype_of[name]) for name, shape in shapes.items()}

    def read(self, name: str, region: TensorSlice) -> Tensor:
        mappings = self.mappings[name]
        if len(mappings) == 1 and not mappings[0].one_expert:
            return self.folder.read(mappings[0].disk_name, region)
        out = torch.empty(region.lengths, dtype=self.specs[name].dtype)
        for mapping in mappings:
            overlap = mapping.region & region
            if overlap is not None:
                values = self.folder.read(mapping.disk_name, mapping.to_disk(overlap))
                out[overlap.relative_to(region.offsets).slices()] = values.view(overlap.lengths)
        return out


def check_tied(source: TensorSource, where: str | Path) -> None:
    """Raise CheckpointError if a stored head of tied weights differs from the embedding."""
    embedding = first_on_disk(EMBEDDING, source.specs)
    if HEAD in source.specs and embedding in source.specs and not same_bytes(source, HEAD, embedding):
        raise CheckpointError(
            f"{where}: {HEAD} differs from {embedding}, though config.json ties the two; set tie_word_embeddings: false at its "
            "top level to train the head that is stored"
        )


def same_bytes(source: TensorSource, one: str, other: str) -> bool:
    """Whether two tensors of a source have the same dtype, shape and bytes."""
    spec = source.specs[one]
    if spec != source.specs[other]:
        return False
    for region in pieces(TensorSlice.full(spec.shape), spec.dtype.itemsize):
        a, b = (source.read(name, region).contiguous().view(-1).view(torch.uint8) for name in (one, other))
        if not torch.equal(a, b):
            return False
    return True


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    outside = [f for f in weight_map.values() if not isinstance(f, str) or Path(f).name != f]
    if outside:
        raise CheckpointError(f"{index}: {reprlib.repr(outside[0])} is not a file of this folder")
    return weight_map


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, and not only config, tokenizer or an index left behind."""
    return any((folder / name).is_file() for name in (WEIGHTS_FILE, WEIGHTS_INDEX)) and any(
        folder.glob("*.safetensors")
    )


def weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files of weights, and the weight map if an index lists them.

    As in transformers, model.safetensors comes first, then the index. Raises CheckpointError if a
    file is missing or not yet downloaded, or if there is neither.
    """
    names, weight_map = _listed_files(folder)
    if unfinished := [path.name for name in names for end in UNFINISHED if (path := folder / f"{name}{end}").exists()]:
        raise CheckpointError(
            f"{folder}: {abbreviate(unfinished)}: a download that did not end, so the file beside it has holes; let it end, or "
            "fetch the model again"
        )
    return names, weight_map


def _listed_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE], None
    if (folder / WEIGHTS_INDEX).is_file():
        weight_map = _read_weight_map(folder / WEIGHTS_INDEX)
        files = sorted(set(weight_map.values()))
        if absent := [file for file in files if not (folder / file).is_file()]:
            raise CheckpointError(f"{folder}: {len(absent)} of {len(files)} weight files missing: {abbreviate(absent)}")
        return files, weight_map
    if files := sorted(path.name for path in folder.glob("*.safetensors")):
        count = f"{len(files)} safetensors file{'s' * (len(files) != 1)}"
        raise CheckpointError(
            f"{folder}: {count}, but no {WEIGHTS_INDEX} that names them, nor {WEIGHTS_FILE}, which are what transformers "
            f"reads: {abbreviate(files)}"
        )
    others = sorted(path.name for path in folder.iterdir() if path.suffix in OTHER_WEIGHTS)
    advice = "weights in that form are not read, save them as safetensors (transformers: save_pretrained)"
    raise CheckpointError(f"{folder}: no safetensors files" + (f"; {abbreviate(others)}: {advice}" if others else ""))


def refuse_unsupported(folder: Path) -> None:
    """Raises CheckpointError or ConfigError for an adapter or quantized weights."""
    for name in ADAPTERS:
        if (folder / name).is_file():
            what = "an adapter beside the model" if (folder / CONFIG).is_file() else "an adapter, not a model"
            raise CheckpointError(f"{folder}: {name} is {what}; {MERGE}, move it away, or set training.lora.adapter")
    for path in sorted(folder.glob("*.json")):
        if QUANTIZED.fullmatch(path.name):
            raise CheckpointError(
                f"{folder}: {path.name} says that the weights are quantized, and those cannot be trained; bring the bf16 "
                "checkpoint, or move the file away if the weights are bf16 all the same"
            )
    if (folder / CONFIG).is_file():
        try:
            refuse_quantized(config_of(folder))
        except ConfigError as error:
            raise ConfigError(f"{folder / CONFIG}: {error}") from None


def config_of(folder: Path) -> dict[str, Any]:
    return read_object(folder / CONFIG, CheckpointError, "not there; a Qwen3.5 checkpoint folder holds config.json")
