"""Processes that rehearse beside each other, one thread each: a rehearsal uses no more."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module

import torch

MOST = 8  # each takes some 2 GB


def workers() -> ProcessPoolExecutor:
    """As many as there are processors."""
    return ProcessPoolExecutor(count(), multiprocessing.get_context("spawn"), _begin)


def count() -> int:
    return min(os.cpu_count() or 1, MOST)


def _begin() -> None:
    torch.set_num_threads(1)
    import_module("kernels.npu")  # and with it, torch has the device
