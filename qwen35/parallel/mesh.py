"""Who shares what: the ranks laid out for the weights, for the experts, and for long sequences."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwen35.layout import layout_of
from qwen35.settings import ParallelSettings


@dataclass(frozen=True)
class Meshes:
    """All ranks in three layouts, the last name counting fastest: neighbours share most.

    A copy of the weights lies on the ranks of `shard`; of its experts, each of the `ep` ranks has its own, cut further over
    `fsdp` (fsdp x ep = shard). The `ulysses` ranks hold parts of the same bins, the `data` ranks have bins of their own.
    """

    weights: DeviceMesh  # [replicate, shard]
    experts: DeviceMesh  # [replicate, fsdp, ep]
    tokens: DeviceMesh  # [data, ulysses]

    @property
    def data_rank(self) -> int:
        return self.tokens["data"].get_local_rank()

    @property
    def data_size(self) -> int:
        return self.tokens["data"].size()

    @property
    def ulysses_size(self) -> int:
        return self.tokens["ulysses"].size()

    @property
    def ulysses_rank(self) -> int:
        return self.tokens["ulysses"].get_local_rank()


def make_meshes(device_type: str, p: ParallelSettings) -> Meshes:
    """Over all ranks of the default group. Raises SettingError."""
    of = layout_of(p, dist.get_world_size())
    return Meshes(
        init_device_mesh(device_type, (of.copies, of.shard), mesh_dim_names=("replicate", "shard")),
        init_device_mesh(device_type, (of.copies, of.fsdp, of.ep), mesh_dim_names=("replicate", "fsdp", "ep")),
        init_device_mesh(device_type, (of.data, of.ulysses), mesh_dim_names=("data", "ulysses")),
    )
