"""Reading a Hugging Face folder, under the names on disk (HFFolder) and the model's (HFSource)."""

import functools
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35.checkpoint.errors import CheckpointError, Mismatch, abbreviate
from qwen35.checkpoint.hf_names import EMBEDDING, HEAD, TensorMapping, mapping_of, mappings_of, may_be_skipped
from qwen35.checkpoint.model_folder import MERGE, config_of, refuse_unsupported
from qwen35.checkpoint.safetensors_file import Header, read_header, read_slice
from qwen35.checkpoint.slices import TensorSlice, TensorSource, TensorSpec, pieces
from qwen35.errors import read_object
from qwen35.model.config import is_tied

WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
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
        self.files: dict[str, Header] = {file: read_header(self.folder / file) for file in names}
        self.file_of: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        mismatch = Mismatch()
        for file, header in self.files.items():
            for name, entry in header.entries.items():
                if name in self.file_of:
                    mismatch.faulty.setdefault(f"in both {self.file_of[name]} and {file}", []).append(name)
                if entry.spec.dtype not in FLOAT_DTYPES:
                    mismatch.faulty.setdefault(f"of {entry.spec.dtype}, as quantized weights are", []).append(name)
                self.file_of[name], self.specs[name] = file, entry.spec
        if adapted := [name for name in self.specs if PEFT_NAME.search(name)]:
            raise CheckpointError(
                f"{folder}: {len(adapted)} tensors have names that PEFT gives ({abbreviate(adapted)}): an adapter that "
                f"is not merged into the weights; {MERGE}"
            )
        if weight_map is not None:
            mismatch.missing = [n for n, file in weight_map.items() if n not in self.files[file].entries]
            mismatch.faulty[f"not in {WEIGHTS_INDEX}"] = [n for n in self.specs if n not in weight_map]
        mismatch.raise_if_any(f"{self.folder}")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The folder's config.json."""
        return config_of(self.folder)

    @property
    def is_tied(self) -> bool:
        """Whether config.json ties the output head to the embedding."""
        return is_tied(self.config)

    def read(self, name: str, region: TensorSlice | None = None) -> Tensor:
        """A tensor on disk, or one region of it, in its stored dtype."""
        entry = self.files[self.file_of[name]].entries[name]
        return read_slice(self.folder / self.file_of[name], entry, region or TensorSlice.full(entry.spec.shape))


class HFSource:
    """A TensorSource over a folder of any layout: the model's names and layouts."""

    def __init__(self, folder: HFFolder):
        """Raises CheckpointError if separate experts have gaps, or differ in shape or dtype."""
        self.folder = folder
        self.mappings: dict[str, list[TensorMapping]] = {}
        for disk_name, spec in folder.specs.items():
            name, mapping = mapping_of(disk_name, spec.shape)
            self.mappings.setdefault(name, []).append(mapping)
        self.specs: dict[str, TensorSpec] = {}
        mismatch = Mismatch()
        for name, mappings in self.mappings.items():
            if name in folder.specs and len(mappings) > 1:
                mismatch.faulty.setdefault("stored both stacked and one by one", []).append(name)
                continue
            shape = [max(s.stop for s in axis) for axis in zip(*(m.region.slices() for m in mappings), strict=True)]
            dtypes = {folder.specs[m.disk_name].dtype for m in mappings}
            if mappings[0].one_expert:
                stored = {m.disk_name: m.disk_shape for m in mappings}
                wanted = {m.disk_name: m.disk_shape for m in mappings_of(name, shape, stored)}
                mismatch.missing += [n for n in wanted if n not in stored]
                mismatch.misshapen |= {n: (s, wanted[n]) for n, s in stored.items() if n in wanted and s != wanted[n]}
            if len(dtypes) > 1:
                fault = f"made of tensors of {' and '.join(sorted(map(str, dtypes)))}"
                mismatch.faulty.setdefault(fault, []).append(name)
            self.specs[name] = TensorSpec(tuple(shape), dtypes.pop())
        mismatch.raise_if_any(f"{folder.folder}")

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


def find_mismatch(folder: HFFolder, shapes: Mapping[str, Sequence[int]]) -> Mismatch:
    """How a folder differs from a model's parameters (name -> shape), in the folder's own names.

    `mtp.*` may be surplus if the model has no such layer, and `lm_head.weight` if its weights are
    tied (`check_tied` compares it with the embedding).
    """
    mismatch = Mismatch()
    used = set()
    for name, shape in shapes.items():
        for mapping in mappings_of(name, shape, folder.specs):
            used.add(mapping.disk_name)
            if mapping.disk_name not in folder.specs:
                mismatch.missing.append(mapping.disk_name)
            elif folder.specs[mapping.disk_name].shape != mapping.disk_shape:
                mismatch.misshapen[mapping.disk_name] = (folder.specs[mapping.disk_name].shape, mapping.disk_shape)
    mismatch.surplus = [n for n in folder.specs if n not in used and not may_be_skipped(n, shapes)]
    if HEAD in mismatch.missing:
        hint = "if the head is the embedding, set tie_word_embeddings: true at the top level of config.json"
        mismatch.hints.append(hint)
    return mismatch


def check_tied(source: TensorSource, where: str | Path) -> None:
    """Raise CheckpointError if a stored head of tied weights differs from the embedding."""
    if HEAD in source.specs and EMBEDDING in source.specs and not same_bytes(source, HEAD, EMBEDDING):
        raise CheckpointError(
            f"{where}: {HEAD} differs from {EMBEDDING}, though config.json ties the two; set tie_word_embeddings: false at its "
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
    file is missing, or if there is neither.
    """
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
