"""What operators derive from cu_seqlens, computed once per batch instead of once per layer."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def computed_once(cu_seqlens: Tensor, key: Any, compute: Callable[[], T]) -> T:
    """compute(), stored on the tensor itself under `key`, so that all layers share it.

    It is freed with the batch. The key must contain all that the result depends on besides the
    lengths, which must not change.
    """
    derived = cu_seqlens.__dict__.setdefault("derived_from_lengths", {})
    if key not in derived:
        derived[key] = compute()
    return derived[key]
