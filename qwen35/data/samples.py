"""The samples of a file, laid end to end in a few arrays, as they are made, kept and shared.

A list of a million objects would be copied into every worker process, as each use of an object
writes to it; the pages of an array, or of a file that it is mapped from, are shared.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor
from torch.nn import functional as F

from qwen35.data.data_warnings import DataWarnings, Skipped
from qwen35.data.files import replacing
from qwen35.errors import SettingError, one_line
from qwen35.log import logger

INT64 = ("offsets", "grids", "image_offsets", "source_offsets", "visual_offsets")
TENSORS = {"ids": torch.int32, "loss_mask": torch.bool, "source_text": torch.uint8, "visual_text": torch.uint8}
TENSORS |= dict.fromkeys(INT64, torch.int64)


@dataclass(frozen=True)
class Values(Sequence[Any]):
    """JSON values, whose texts are laid end to end."""

    text: Tensor  # [bytes] uint8
    offsets: Tensor  # [N+1] int64: value i is bytes offsets[i]:offsets[i+1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        return json.loads(self.text[int(self.offsets[i]) : int(self.offsets[i + 1])].numpy().tobytes())

    def objects(self, first: int = 0, end: int | None = None) -> int:
        """How many of the values first..end are objects."""
        starts = self.offsets[:-1][first:end]
        return int((self.text[starts] == ord("{")).sum())


@dataclass(frozen=True)
class FileSamples:
    """The N samples of one file, laid end to end, and what was left out."""

    file: str
    ids: Tensor  # [tokens] int32
    loss_mask: Tensor  # [tokens] bool
    offsets: Tensor  # [N+1] int64: sample i is tokens offsets[i]:offsets[i+1]
    grids: Tensor  # [M, 3] int64 of all images and videos
    image_offsets: Tensor  # [N+1] int64: sample i has grids image_offsets[i]:image_offsets[i+1]
    source_text: Tensor
    source_offsets: Tensor
    visual_text: Tensor
    visual_offsets: Tensor
    records: int  # records read, of one sample or several each, and those left out
    skipped: Skipped
    warnings: DataWarnings

    @property
    def sources(self) -> Values:
        """[N] of each sample, for messages."""
        return Values(self.source_text, self.source_offsets)

    @property
    def visuals(self) -> Values:
        """[M] images and videos, each as visual_to_json writes it."""
        return Values(self.visual_text, self.visual_offsets)


@dataclass
class Collected:
    """Samples in the making: of each tensor of FileSamples its bytes, but lengths for offsets."""

    warnings: DataWarnings
    arrays: dict[str, bytearray] = field(default_factory=lambda: {name: bytearray() for name in TENSORS})
    records: int = 0
    skipped: Skipped = field(default_factory=Skipped)

    def add(self, **items: Any) -> None:
        """Of tensors the next items, of offsets the next length."""
        for name, item in items.items():
            self.arrays[name] += np.asarray(item, np.int64).tobytes() if name in INT64 else item

    def add_values(self, name: str, values: Iterable[Any]) -> None:
        for value in values:
            text = json.dumps(value).encode()
            self.add(**{f"{name}_text": text, f"{name}_offsets": len(text)})

    def extend(self, other: "Collected") -> None:
        for name, array in other.arrays.items():
            self.arrays[name] += array
        self.records += other.records
        self.skipped.update(other.skipped)
        self.warnings.update(other.warnings)

    @classmethod
    def of(cls, samples: FileSamples) -> "Collected":
        tensors = {name: getattr(samples, name) for name in TENSORS}
        tensors |= {name: tensor.diff() for name, tensor in tensors.items() if name.endswith("offsets")}
        arrays = {name: bytearray(tensor.contiguous().view(-1).numpy().data) for name, tensor in tensors.items()}
        return cls(samples.warnings, arrays, samples.records, samples.skipped)

    def samples(self, file: str) -> FileSamples:
        tensors = {
            name: torch.frombuffer(array, dtype=TENSORS[name]) if array else torch.zeros(0, dtype=TENSORS[name])
            for name, array in self.arrays.items()
        }
        lengths = {name: tensor for name, tensor in tensors.items() if name.endswith("offsets")}
        tensors |= {name: F.pad(tensor.cumsum(0), (1, 0)) for name, tensor in lengths.items()}
        tensors["grids"] = tensors["grids"].reshape(-1, 3)
        return FileSamples(file, **tensors, records=self.records, skipped=self.skipped, warnings=self.warnings)


def read_samples(path: Path, is_mapped: bool = True) -> FileSamples | None:
    """The samples of a file, or None; one that is damaged or outdated is removed.

    is_mapped: the tensors stay mapped from the file, whose pages the processes of a machine share.
    It must not be removed meanwhile: on a network file system, that would end this process.
    """
    if not path.is_file():
        return None
    try:
        samples = _read(path, is_mapped)
        if not samples.skipped.is_outdated():
            return samples
    except FileNotFoundError:  # another machine has removed it since
        return None
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: the digest does not match
        logger.warning(f"{path}: is damaged, and made anew: {one_line(error)}")
    path.unlink(missing_ok=True)  # now: later, a file of this name may be another process's new one
    return None


def _read(path: Path, is_mapped: bool) -> FileSamples:
    if is_mapped:
        with safe_open(path, framework="pt") as entry:
            tensors, metadata = {key: entry.get_tensor(key) for key in (*TENSORS, "names")}, entry.metadata()
    else:
        data = path.read_bytes()
        tensors, end = load(data), 8 + int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8:end]).get("__metadata__")
    if (metadata or {}).get("digest") != _digest(tensors):
        raise ValueError("its bytes are not those that were written")
    names = json.loads(tensors.pop("names").numpy().tobytes())
    names["skipped"], names["warnings"] = Skipped(**names["skipped"]), DataWarnings(**names["warnings"])
    return FileSamples(**tensors, **names)


def write_samples(samples: FileSamples, path: Path) -> None:
    """Raises SettingError."""
    names = {"file": samples.file, "records": samples.records}
    names |= {part: asdict(getattr(samples, part)) for part in ("skipped", "warnings")}
    tensors = {name: getattr(samples, name) for name in TENSORS}
    tensors["names"] = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
    try:
        with replacing(path, keep_first=True) as temporary:
            save_file(tensors, temporary, {"digest": _digest(tensors)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # before the rename: a machine that goes down must not leave half an entry
    except (OSError, SafetensorError) as error:  # safetensors raises its own where it cannot write
        raise unwritable(path, error) from None


def unwritable(path: Path, error: Exception) -> SettingError:
    reason = getattr(error, "strerror", None) or one_line(error)
    return SettingError(f"data.dataset_param.basic_parameters.cache_dir: {path.parent}: {reason}")


def _digest(tensors: dict[str, Tensor]) -> str:
    """Covers names, types, shapes and every byte; takes 0.1 s for the tokens of 150,000 records."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
