"""A rank's random states, saved in checkpoints, so that a resumed run draws the same numbers."""

import random
from typing import Any

import numpy as np
import torch

from qwen35.device import device_rng_state, set_device_rng_state

# what `restore_rng` raises for states that are damaged
BROKEN_STATES = (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)


def seed_all(seed: int) -> None:
    """Seed every generator of this process, its device's too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # libraries draw from numpy's global generator
    torch.manual_seed(seed)


def rng_states(device: torch.device) -> dict[str, Any]:
    """All generators' states, of types that a checkpoint's extra data may hold."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "device": device_rng_state(device),
    }


def restore_rng(states: dict[str, Any], device: torch.device) -> None:
    """The inverse of `rng_states`. Raises BROKEN_STATES."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["device"] is not None:
        set_device_rng_state(states["device"], device)
