"""Reading DCP checkpoints part by part, without any communication."""

import os
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from qwen35.checkpoint.boxes import Box, TensorSpec
from qwen35.checkpoint.dcp_folder import METADATA
from qwen35.checkpoint.dcp_item import BROKEN_ARCHIVE, DCPItem, find_item
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.lock import hold_for_reading
from qwen35.errors import one_line

MODEL, OPTIMIZER = "model.", "optimizer."  # what the names in a checkpoint begin with

METADATA_MODULE = "torch.distributed.checkpoint.metadata"
SAFE_NAMES = {  # besides the dtypes and the classes of METADATA_MODULE
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


# what pickle raises for broken data (its documentation lists most)
BROKEN_PICKLE = (
    pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, MemoryError, TypeError, ValueError
)  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Refuses all but the classes that describe tensors: a .metadata of unknown origin cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        # not what the module has imported, nor (by a dot) what lies inside of it
        is_description = module == METADATA_MODULE and getattr(vars(dcp_metadata).get(name), "__module__", "") == module
        if is_dtype or is_description or (module, name) in SAFE_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


class DCPSource:
    """A Source over the tensors of a checkpoint whose names begin with `prefix`, without it.

    While there is one, the run that wrote the checkpoint does not remove it (training.save_total_limit).
    """

    def __init__(self, checkpoint: str | Path, prefix: str = MODEL):
        """`checkpoint` is the folder that holds .metadata, known to be whole."""
        self.checkpoint, self.prefix = Path(checkpoint), prefix
        try:
            weakref.finalize(self, os.close, hold_for_reading(self.checkpoint / METADATA))
            with (self.checkpoint / METADATA).open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
            self._stored = metadata.storage_data
            self._chunks: dict[str, list[Box]] = {}
            self.specs: dict[str, TensorSpec] = {}
            for full_name, entry in metadata.state_dict_metadata.items():
                if full_name.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
                    name = full_name.removeprefix(prefix)
                    self.specs[name] = TensorSpec(tuple(entry.size), entry.properties.dtype)
                    self._chunks[name] = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
        except OSError as error:
            name = Path(error.filename or ".metadata").name
            raise CheckpointError(f"{self.checkpoint}: {name} cannot be read: {error.strerror}") from None
        except BROKEN_PICKLE as error:
            raise CheckpointError(f"{self.checkpoint}: .metadata is broken or not DCP's: {one_line(error)}") from None
        self._items: dict[tuple[str, Box], DCPItem] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def read(self, name: str, box: Box) -> Tensor:
        """Reads the bytes of `box` and nothing else, however large the pieces are in which the tensor was stored."""
        out, filled = torch.empty(box.size, dtype=self.specs[name].dtype), 0
        for chunk in self._chunks[name]:
            part = chunk & box
            if part is not None:
                values = self._read_part(name, chunk, part.seen_from(chunk.start))
                if part == box:
                    return values
                out[part.seen_from(box.start).slices()] = values
                filled += part.numel
        if filled < box.numel:
            raise CheckpointError(f"{self.checkpoint}: a part of {self.prefix}{name} is missing")
        return out

    def _read_part(self, name: str, chunk: Box, part: Box) -> Tensor:
        """`part`, counted from the chunk's start."""
        try:
            item = self._items.get((name, chunk))
            if item is None:
                item = self._items[name, chunk] = self._find(name, chunk)
            return item.read(part)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self.checkpoint}: {self.prefix}{name} cannot be read: {one_line(error)}") from None
        except (*BROKEN_ARCHIVE, *BROKEN_PICKLE):
            raise CheckpointError(
                f"{self.checkpoint}: {self.prefix}{name} cannot be read: its file is damaged"
            ) from None

    def _find(self, name: str, chunk: Box) -> DCPItem:
        info = self._stored[MetadataIndex(self.prefix + name, torch.Size(chunk.start))]
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{self.checkpoint}: {self.prefix}{name} is stored in a form that is not supported")
        if Path(info.relative_path).name != info.relative_path:
            raise pickle.UnpicklingError("it lies outside of the folder")
        item = find_item(self.checkpoint / info.relative_path, info.offset, info.length)
        if item.spec != TensorSpec(chunk.size, self.specs[name].dtype):
            raise pickle.UnpicklingError("it is another tensor")
        return item
