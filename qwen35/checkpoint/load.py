"""Filling tensors from any Source: each rank reads only the parts that it holds."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qwen35.checkpoint.boxes import Source, local_part, pieces

WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters under the checkpoint's names: without the prefixes that wrappers of modules add."""
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        named[name] = parameter
    return named


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], source: Source, progress: Callable[[int], object] | None = None) -> None:
    """Copy each tensor's own part from the source, cast to its dtype. Names and shapes must have been checked."""
    for name, tensor in tensors.items():
        local, box = local_part(tensor)
        itemsize = source.specs[name].dtype.itemsize
        for part in pieces(box, itemsize):
            values = source.read(name, part)
            local[part.seen_from(box.start).slices()].copy_(values)
            if progress:
                progress(values.nbytes)
