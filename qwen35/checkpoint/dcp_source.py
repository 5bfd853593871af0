"""Reading DCP checkpoints part by part, without any communication."""

import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qwen35.checkpoint.checksums import ChecksumError, read_slice_checked
from qwen35.checkpoint.dcp_folder import MANIFEST, METADATA, damaged, read_manifest
from qwen35.checkpoint.dcp_index import Chunk, read_index
from qwen35.checkpoint.dcp_item import BROKEN_ARCHIVE, ArchivedTensor, find_archived_tensor
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.lock import hold_for_reading
from qwen35.checkpoint.safetensors_file import Entry
from qwen35.checkpoint.slices import TensorSlice, TensorSpec
from qwen35.errors import one_line

MODEL, OPTIMIZER = "model.", "optimizer."  # what the names in a checkpoint begin with


class DCPSource:
    """A Source over the tensors of a checkpoint whose names begin with `prefix`, without it. What is read is checked.

    While there is one, the run that wrote the checkpoint does not remove it (training.save_total_limit).
    """

    def __init__(self, checkpoint: str | Path, prefix: str = MODEL):
        """`checkpoint` is the folder that holds .metadata, known to be whole if it has a marker."""
        self.checkpoint, self.prefix = Path(checkpoint), prefix
        try:
            weakref.finalize(self, os.close, hold_for_reading(self.checkpoint / METADATA))
        except OSError as error:
            raise CheckpointError(f"{self.checkpoint}: {METADATA} cannot be read: {error.strerror}") from None
        manifest = read_manifest(self.checkpoint) if (self.checkpoint / MANIFEST).exists() else {}
        stored = read_index(self.checkpoint, manifest)
        self._stored = {name.removeprefix(prefix): one for name, one in stored.items() if name.startswith(prefix)}
        self.specs: dict[str, TensorSpec] = {name: one.spec for name, one in self._stored.items()}
        self._items: dict[Chunk, ArchivedTensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def read(self, name: str, region: TensorSlice) -> Tensor:
        """Reads the bytes of `region` and what shares a block with them, however large the pieces are that were stored.

        What has no checksums of blocks is read whole once.
        """
        out = torch.empty(region.lengths, dtype=self.specs[name].dtype)
        for chunk in self._stored[name].chunks:  # which together hold each element once
            part = chunk.region & region
            if part is not None:
                values = self._read_part(name, chunk, part.relative_to(chunk.region.offsets))
                if part == region:
                    return values
                out[part.relative_to(region.offsets).slices()] = values
        return out

    def _read_part(self, name: str, chunk: Chunk, part: TensorSlice) -> Tensor:
        """`part`, counted from the chunk's start."""
        path, spec = self.checkpoint / chunk.file, TensorSpec(chunk.region.lengths, self.specs[name].dtype)
        try:
            if chunk.crc32 is not None:
                return read_slice_checked(path, Entry(spec, chunk.begin), chunk.crc32, part)
            item = self._items.get(chunk)
            if item is None:
                item = find_archived_tensor(path, chunk.begin, chunk.nbytes)
                if item.spec != spec:
                    raise ChecksumError("another tensor is there")
                item.check()  # whole: an archive has one checksum for all of a tensor
                self._items[chunk] = item
            return item.read(part)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self.checkpoint}: {self.prefix}{name} cannot be read: {one_line(error)}") from None
        except BROKEN_ARCHIVE as error:
            why = one_line(error) if isinstance(error, ChecksumError) else "it is no archive of torch's"
            raise damaged(self.checkpoint, chunk.file, f"is damaged where {self.prefix}{name} lies: {why}") from None
