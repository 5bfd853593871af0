"""Reading DCP checkpoints part by part, without any communication."""

import os
import pickle
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from qwen35.checkpoint.boxes import Box, TensorSpec
from qwen35.checkpoint.dcp_folder import MARKER
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


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, dcp_metadata.Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        return metadata


class _IntoTensor(DefaultLoadPlanner):
    """Has the reader put what it reads into one given tensor."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return self.out[Box(tuple(read_item.dest_offsets), tuple(read_item.lengths)).slices()]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # it is already in place


class DCPSource:
    """A Source over the tensors of a checkpoint whose names begin with `prefix`, without it.

    While there is one, the run that wrote the checkpoint does not remove it (training.save_total_limit).
    """

    def __init__(self, checkpoint: str | Path, prefix: str = MODEL):
        """`checkpoint` is the folder that holds .metadata, known to be whole."""
        self.checkpoint, self.prefix = Path(checkpoint), prefix
        self._reader = _Reader(self.checkpoint)
        try:
            weakref.finalize(self, os.close, hold_for_reading(self.checkpoint / MARKER))
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            self._tensors: dict[str, TensorStorageMetadata] = {
                name.removeprefix(prefix): entry
                for name, entry in metadata.state_dict_metadata.items()
                if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
            }
            self.specs: Mapping[str, TensorSpec] = {
                name: TensorSpec(tuple(entry.size), entry.properties.dtype) for name, entry in self._tensors.items()
            }
        except OSError as error:
            name = Path(error.filename or ".metadata").name
            raise CheckpointError(f"{self.checkpoint}: {name} cannot be read: {error.strerror}") from None
        except BROKEN_PICKLE as error:
            raise CheckpointError(f"{self.checkpoint}: .metadata is broken or not DCP's: {one_line(error)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def read(self, name: str, box: Box) -> Tensor:
        out = torch.empty(box.size, dtype=self.specs[name].dtype)
        chunk = ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.size))
        try:
            items = create_read_items_for_chunk_list(self.prefix + name, self._tensors[name], [chunk])
            self._reader.read_data(LoadPlan(items), _IntoTensor(out)).wait()
        except OSError as error:
            raise CheckpointError(f"{self.checkpoint}: {self.prefix}{name} cannot be read: {one_line(error)}") from None
        except (RuntimeError, *BROKEN_PICKLE):  # what torch says of damaged data fills a page
            raise CheckpointError(
                f"{self.checkpoint}: {self.prefix}{name} cannot be read: its file is damaged"
            ) from None
        return out
