"""What operators make of cu_seqlens: once a batch, not once a layer."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


def made_once(cu_seqlens: Tensor, key: Any, make: Callable[[], T]) -> T:
    """make(), kept with the tensor itself under `key`: all layers find it there, and it goes when the batch does.

    The key says all that the result follows from beside the lengths, which nobody changes.
    """
    made = cu_seqlens.__dict__.setdefault("made_of_lengths", {})
    if key not in made:
        made[key] = make()
    return made[key]
