"""Reading DCP checkpoints slice by slice, without any communication."""

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

MODEL, OPTIMIZER = "model.", "optimizer."  # prefixes of the names in a checkpoint


class DCPSource:
    """A TensorSource over a checkpoint's tensors under `prefix`, which is stripped from the names.

    Checksums are verified. As long as this object exists, no run removes the checkpoint
    (training.save_total_limit).
    """

    def __init__(self, checkpoint: str | Path, prefix: str = MODEL):
        """`checkpoint` holds .metadata. It is checked against its complete.json if it has one."""
        self.checkpoint, self.prefix = Path(checkpoint), prefix
        try:
            weakref.finalize(self, os.close, hold_for_reading(self.checkpoint / METADATA))
        except OSError as error:
            raise CheckpointError(f"{self.checkpoint}: {METADATA} cannot be read: {error.strerror}") from None
        manifest = read_manifest(self.checkpoint) if (self.checkpoint / MANIFEST).exists() else {}
        stored = read_index(self.checkpoint, manifest)
        self._stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        self.specs: dict[str, TensorSpec] = {name: tensor.spec for name, tensor in self._stored.items()}
        self._checked: dict[Chunk, ArchivedTensor] = {}  # chunks without checksums of blocks

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def read(self, name: str, region: TensorSlice) -> Tensor:
        """Reads only the checksum blocks that hold the region, however large the stored chunks are.

        A chunk without checksums of blocks is read whole once.
        """
        out = torch.empty(region.lengths, dtype=self.specs[name].dtype)
        for chunk in self._stored[name].chunks:  # together they hold each element once
            overlap = chunk.region & region
            if overlap is not None:
                values = self._read_chunk(name, chunk, overlap.relative_to(chunk.region.offsets))
                if overlap == region:
                    return values
                out[overlap.relative_to(region.offsets).slices()] = values
        return out

    def _read_chunk(self, name: str, chunk: Chunk, part: TensorSlice) -> Tensor:
        """Read `part`, whose offsets are relative to the chunk."""
        path, spec = self.checkpoint / chunk.file, TensorSpec(chunk.region.lengths, self.specs[name].dtype)
        try:
            if chunk.crc32 is not None:
                return read_slice_checked(path, Entry(spec, chunk.begin), chunk.crc32, part)
            tensor = self._checked.get(chunk)
            if tensor is None:
                tensor = find_archived_tensor(path, chunk.begin, chunk.nbytes)
                if tensor.spec != spec:
                    raise ChecksumError("it holds another tensor")
                tensor.check()  # reads it whole: an archive has one checksum for the whole tensor
                self._checked[chunk] = tensor
            return tensor.read(part)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self.checkpoint}: {self.prefix}{name} cannot be read: {one_line(error)}") from None
        except BROKEN_ARCHIVE as error:
            why = one_line(error) if isinstance(error, ChecksumError) else "it is not an archive written by torch"
            raise damaged(self.checkpoint, chunk.file, f"is damaged at {self.prefix}{name}: {why}") from None
