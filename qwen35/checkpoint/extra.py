"""The small extras of a checkpoint (random states, counters) as JSON, which cannot run code."""

import base64
from typing import Any

import torch
from torch import Tensor

from qwen35.checkpoint.safetensors_file import CODES, DTYPES, raw_bytes


def encode(value: Any, path: str = "extra") -> Any:
    """Turn numbers, strings, lists, tuples, tensors, and dicts with string keys into JSON values.

    Raises TypeError for anything else, naming its path.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        data = raw_bytes(value.detach().cpu().contiguous()).tobytes()
        shape = list(value.shape)
        return {"$tensor": base64.b64encode(data).decode(), "dtype": CODES[value.dtype], "shape": shape}
    if isinstance(value, list):
        return [encode(v, f"{path}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [encode(v, f"{path}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(k, str) and not k.startswith("$") for k in value):
        return {k: encode(v, f"{path}.{k}") for k, v in value.items()}
    raise TypeError(f"{path}: {type(value).__name__} cannot be saved in a checkpoint")


def decode(value: Any) -> Any:
    """The exact inverse of `encode`: floats, tuples and dtypes of tensors are preserved."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tuple" in value:
        return tuple(decode(v) for v in value["$tuple"])
    if "$tensor" in value:
        data = bytearray(base64.b64decode(value["$tensor"]))
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return flat.view(DTYPES[value["dtype"]]).view(value["shape"])
    return {k: decode(v) for k, v in value.items()}
