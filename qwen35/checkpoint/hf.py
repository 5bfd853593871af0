"""Loading a Hugging Face folder into a model, and checking beforehand that it fits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen35.checkpoint.hf_names import HEAD, missing_mtp_hint, shapes_of
from qwen35.checkpoint.hf_read import HFFolder, HFSource, check_tied, find_mismatch, has_weights
from qwen35.checkpoint.hf_write import check_exportable
from qwen35.checkpoint.load import FiniteSource, fill, named_parameters
from qwen35.device import HOST
from qwen35.model import Qwen35, load_config


def load_hf(
    model: nn.Module, folder: str | Path, strict: bool = True, progress: Callable[[int], object] | None = None
) -> None:
    """Load a Hugging Face folder into a model, plain or sharded, that has left the meta device.

    Values are cast to the parameters' dtypes. Every rank reads the byte ranges of its own slices,
    without communication. `progress` is called with the bytes read. One CheckpointError lists all
    tensors that are missing, surplus or of another shape; with `strict=False` missing parameters
    keep their values and surplus tensors are ignored. `mtp.*` is skipped for a model without that
    layer, and `lm_head.weight` for tied weights, if it equals the embedding.
    """
    source = HFSource(open_matching_folder(model, folder, strict))
    parameters = named_parameters(model)
    if HEAD not in parameters:
        check_tied(source, folder)
    fill({name: p for name, p in parameters.items() if name in source.specs}, FiniteSource(source, folder), progress)


def open_matching_folder(model: nn.Module, folder: str | Path, strict: bool = True) -> HFFolder:
    """A folder whose index and headers must fit the model. Raises CheckpointError."""
    disk = HFFolder(folder)
    shapes = shapes_of(named_parameters(model).items())
    mismatch = find_mismatch(disk, shapes)
    if strict:
        mismatch.hints += missing_mtp_hint(shapes, disk.specs)
    else:
        mismatch.missing, mismatch.surplus, mismatch.hints = [], [], []
    mismatch.raise_if_any(f"{folder} does not fit the model")
    return disk


def check_export(model: nn.Module, folder: str | Path) -> None:
    """Raises CheckpointError if the model could not be exported like a folder with weights."""
    if has_weights(Path(folder)):
        shapes = shapes_of(named_parameters(model).items())
        check_exportable(shapes, HFFolder(folder), f"what is trained could not be exported like {folder}")


def load_pretrained(hf_dir: str | Path, dtype: torch.dtype | None = None, **kwargs: Any) -> Qwen35:
    """A new model, `Qwen35(config, **kwargs)`, with a folder's weights as plain CPU tensors.

    dtype: of all parameters; None keeps the stored dtypes.
    """
    model = empty_model(hf_dir, stored_dtypes(hf_dir) if dtype is None else lambda _: dtype, **kwargs)
    load_hf(model, hf_dir)
    return model


def empty_model(hf_dir: str | Path, dtype_of: Callable[[str], torch.dtype], **kwargs: Any) -> Qwen35:
    """A new model on the CPU from a folder's config.json; its parameters are left uninitialized."""
    with torch.device("meta"):
        model = Qwen35(load_config(hf_dir), **kwargs)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            empty = torch.empty(parameter.shape, dtype=dtype_of(full_name), device=HOST)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    return model


def stored_dtypes(hf_dir: str | Path) -> Callable[[str], torch.dtype]:
    """A function from parameter name to its dtype in a folder, or to fp32 if it is not there."""
    specs = HFSource(HFFolder(hf_dir)).specs
    return lambda name: specs[name].dtype if name in specs else torch.float32
