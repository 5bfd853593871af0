"""A rank that writes down every collective, where ranks meet very different data in each step.

`collectives.py RECIPE [a.b=c …]` runs under the launcher. Records 1, 2 and 5 have an image, that of
5 is broken; 0 and 3 have none. LOG is the folder for `<rank>.json`: a list of [name, group's ranks,
shapes and types of the tensors].
"""

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen35 import train
from qwen35.data import MicroBatches
from qwen35.rank import leave
from qwen35.training.metrics import Metrics

KINDS = {"images": [1, 2], "text": [0, 3], "untrained": [0, 3], "bad": [5]}


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does inside comes here too
        if func.namespace in ("c10d", "_c10d_functional"):
            leaves = tree_leaves((args, kwargs or {}))
            tensors = [f"{list(x.shape)} {x.dtype}" for x in leaves if isinstance(x, torch.Tensor)]
            if "alltoall" in func.name():  # of the tokens to their experts: that many are sent to each
                tensors = [str(x.dtype) for x in leaves if isinstance(x, torch.Tensor)]
            self.calls.append([func.name(), [members(x) for x in leaves if is_group(x)], tensors])
        return func(*args, **(kwargs or {}))


def is_group(x: object) -> bool:
    return isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())


def members(x: torch.ScriptObject) -> int:
    return dist.ProcessGroup.unbox(x).size()


def batches(settings, rank: int):
    loader = MicroBatches(settings, 0, 1)
    for micro_step in itertools.count():
        kind = list(KINDS)[(rank + micro_step) % len(KINDS)]
        batch = loader._batches[[KINDS[kind]]]
        if kind == "untrained":
            nothing = torch.zeros(0, dtype=torch.int64)
            batch = dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100), label_positions=nothing)
        assert bool(batch.bad_records) == (kind == "bad") and bool(len(batch.label_positions)) == (
            kind in ("images", "text")
        )
        yield batch


def main(arguments: list[str]) -> int:
    recorder, rank = Recorder(), os.environ["RANK"]
    setup, step, flush = train.setup, train.train_step, Metrics.flush

    def other_data(settings, *others):
        run = setup(settings, *others)
        run.micro_batches = batches(settings, run.meshes.data_rank)
        return run

    def recorded(function):
        def wrapped(*args, **kwargs):
            with recorder:
                return function(*args, **kwargs)

        return wrapped

    train.setup, train.train_step, Metrics.flush = other_data, recorded(step), recorded(flush)
    code = train.main(arguments)
    Path(os.environ["LOG"], f"{rank}.json").write_text(json.dumps(recorder.calls))
    return code


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
