"""The order of FSDP's collectives around the layers' computation, over a fake process group."""

import pytest
import torch.distributed as dist
from peer import config_dict, pack, sample
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from qwen35.config.schema import ParallelSettings
from qwen35.model import Qwen35
from qwen35.parallel.fsdp import shard
from qwen35.parallel.mesh import make_meshes
from qwen35.training.loss import make_mtp_targets, token_weights

NAMES = {"c10d::_allgather_base_": "gather", "c10d::_reduce_scatter_base_": "reduce"}


@pytest.fixture
def four_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.seen.append(NAMES[func.name()])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_the_next_unit_is_prefetched(four_ranks, recompute):
    model, seen = Qwen35.from_config(config_dict(), seed=1, mtp=True), []
    blocks, layers = list(model.model.visual.blocks), list(model.model.language_model.layers)
    computing = {
        **{f"block {i}": b.mlp for i, b in enumerate(blocks)},
        **{f"layer {i}": m.mlp for i, m in enumerate(layers)},
    }
    computing["mtp"] = model.mtp.layers[0].mlp
    for name, module in computing.items():
        module.register_forward_pre_hook(lambda m, args, name=name: seen.append(name))
        module.register_full_backward_pre_hook(lambda m, grad, name=name: seen.append(f"{name} backward"))
    shard(model, make_meshes("cpu", ParallelSettings()), next(model.parameters()).dtype)
    model.recompute(recompute)
    batch = pack([sample([9, (4, 4), 6], seed=0), sample([20], seed=1)])
    with Collectives(seen):
        loss, aux, _ = model.loss(batch, token_weights(batch, "default"), make_mtp_targets(batch, "default"))
        forward = list(seen)
        (loss + aux).backward()
    units = 2 + len(blocks) + len(layers) + 1  # and the root and the tower; the last unit has no next one
    assert forward.count("gather") == units
    for i, name in enumerate(computing):
        assert forward[: forward.index(name)].count("gather") == min(units, 2 + i + 2), name
    backward = seen[len(forward) :]
    for i, name in enumerate(reversed([n for n in computing if n.startswith("layer")])):
        # each was unsharded one unit ahead of its computation
        assert backward[: backward.index(f"{name} backward")].count("gather") == 1 + i + 1 + 1, name
    assert seen.count("reduce") == units
