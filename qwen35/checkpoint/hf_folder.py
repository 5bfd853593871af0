"""Reading a Hugging Face folder: as it is on disk, and under the model's names."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen35.checkpoint.boxes import Box, Source, TensorSpec, pieces
from qwen35.checkpoint.errors import CheckpointError, Misfit, fold
from qwen35.checkpoint.names import EMBEDDING, HEAD, Place, home, may_be_left, places
from qwen35.checkpoint.safetensors_file import Header, read_box, read_header
from qwen35.errors import read_object

INDEX = "model.safetensors.index.json"


class HFFolder:
    """The tensors of a folder as they are on disk: one safetensors file, or many with model.safetensors.index.json."""

    def __init__(self, folder: str | Path):
        """Reads index and headers. Raises CheckpointError if a file is missing or broken, or index and files differ."""
        self.folder = Path(folder)
        self.index = self.folder / INDEX if (self.folder / INDEX).is_file() else None
        weight_map = _read_weight_map(self.index) if self.index else None
        self.files: dict[str, Header] = {}
        for file in _weight_files(self.folder, weight_map):
            self.files[file] = read_header(self.folder / file)
        self.file_of: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        wrong = Misfit()
        for file, header in self.files.items():
            for name, entry in header.entries.items():
                if name in self.file_of:
                    wrong.other.append(f"{name} is in both {self.file_of[name]} and {file}")
                if not entry.spec.dtype.is_floating_point:
                    wrong.other.append(f"{name} is {entry.spec.dtype}, not floating point")
                self.file_of[name], self.specs[name] = file, entry.spec
        if weight_map is not None:
            wrong.missing = [n for n, file in weight_map.items() if n not in self.files[file].entries]
            not_listed = [n for n in self.specs if n not in weight_map]
            if not_listed:
                wrong.other.append(f"not in {INDEX}: {fold(not_listed)}")
        wrong.raise_if_any(f"{self.folder}")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The folder's config.json."""
        return read_object(self.folder / "config.json", CheckpointError)

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the embedding, by config.json."""
        return bool(self.config.get("tie_word_embeddings", False))

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A tensor on disk, or a part of it, in its own dtype."""
        entry = self.files[self.file_of[name]].entries[name]
        return read_box(self.folder / self.file_of[name], entry, box or Box.whole(entry.spec.shape))


class HFSource:
    """A Source over a Hugging Face folder: the model's names and layouts, whatever the folder's layout is."""

    def __init__(self, folder: HFFolder):
        """Raises CheckpointError if experts that are stored one by one have gaps, or differ in shape or dtype."""
        self.folder = folder
        self.places: dict[str, list[Place]] = {}
        for disk_name, spec in folder.specs.items():
            name, place = home(disk_name, spec.shape)
            self.places.setdefault(name, []).append(place)
        self.specs: dict[str, TensorSpec] = {}
        wrong = Misfit()
        for name, found in self.places.items():
            if name in folder.specs and len(found) > 1:
                wrong.other.append(f"{name} is there stacked and also one by one")
                continue
            end = [max(p.box.start[d] + p.box.size[d] for p in found) for d in range(len(found[0].box.size))]
            dtypes = {folder.specs[p.name].dtype for p in found}
            if found[0].one_expert:
                there = {p.name: p.disk_shape for p in found}
                wanted = {p.name: p.disk_shape for p in places(name, end, there)}
                wrong.missing += [n for n in wanted if n not in there]
                wrong.misshapen |= {n: (s, wanted[n]) for n, s in there.items() if n in wanted and s != wanted[n]}
            if len(dtypes) > 1:
                wrong.other.append(f"{name} is made of tensors of different dtypes: {sorted(map(str, dtypes))}")
            self.specs[name] = TensorSpec(tuple(end), dtypes.pop())
        wrong.raise_if_any(f"{folder.folder}")

    def read(self, name: str, box: Box) -> Tensor:
        found = self.places[name]
        if len(found) == 1 and not found[0].one_expert:
            return self.folder.read(found[0].name, box)
        out = torch.empty(box.size, dtype=self.specs[name].dtype)
        for place in found:
            part = place.box & box
            if part is not None:
                values = self.folder.read(place.name, place.on_disk(part))
                out[part.seen_from(box.start).slices()] = values.view(part.size)
        return out


def misfit(folder: HFFolder, shapes: Mapping[str, Sequence[int]]) -> Misfit:
    """How a folder differs from a model's parameters (name -> shape), told in the folder's own names.

    Of no concern are `mtp.*` where the model has no such layer, and a `lm_head.weight` that a model with tied weights
    does not have (`check_tied` compares it with the embedding).
    """
    found = Misfit()
    used = set()
    for name, shape in shapes.items():
        for place in places(name, shape, folder.specs):
            used.add(place.name)
            if place.name not in folder.specs:
                found.missing.append(place.name)
            elif folder.specs[place.name].shape != place.disk_shape:
                found.misshapen[place.name] = (folder.specs[place.name].shape, place.disk_shape)
    found.surplus = [n for n in folder.specs if n not in used and not may_be_left(n, shapes)]
    return found


def check_tied(source: Source, where: str | Path) -> None:
    """If the head of tied weights is stored all the same, it must be the embedding, byte for byte, or CheckpointError.

    Taking the embedding for a head that differs would quietly be another model.
    """
    if HEAD in source.specs and EMBEDDING in source.specs and not equal(source, HEAD, EMBEDDING):
        raise CheckpointError(f"{where}: {HEAD} differs from {EMBEDDING}, though the model ties the two")


def equal(source: Source, one: str, other: str) -> bool:
    """Whether two tensors of a Source have the same dtype, shape and bytes."""
    spec = source.specs[one]
    if spec != source.specs[other]:
        return False
    for box in pieces(Box.whole(spec.shape), spec.dtype.itemsize):
        a, b = (source.read(name, box).contiguous().view(-1).view(torch.uint8) for name in (one, other))
        if not torch.equal(a, b):
            return False
    return True


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    outside = [f for f in weight_map.values() if not isinstance(f, str) or Path(f).name != f]
    if outside:
        raise CheckpointError(f"{index}: {outside[0]!r} is not a file of this folder")
    return weight_map


def _weight_files(folder: Path, weight_map: Mapping[str, str] | None) -> list[str]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if weight_map is not None:
        files = sorted(set(weight_map.values()))
        absent = [f for f in files if not (folder / f).is_file()]
        if absent:
            raise CheckpointError(f"{folder}: {len(absent)} of {len(files)} weight files missing: {', '.join(absent)}")
        return files
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no safetensors files")
    if len(files) > 1:
        raise CheckpointError(f"{folder}: {len(files)} safetensors files, but no {INDEX}")
    return files
