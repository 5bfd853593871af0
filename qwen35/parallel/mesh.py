"""Who shares what: the ranks laid out for the weights, for the experts, and for long sequences."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwen35.errors import SettingError
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


def sizes(p: ParallelSettings, world: int) -> tuple[int, int, int]:
    """Ranks that share a copy of the weights, its experts, a bin. Raises SettingError where they do not divide."""
    shard, ep, ulysses = p.fully_shard_parallel_size or world, p.expert_parallel_size, p.ulysses_parallel_size
    for name, size, of, what in (
        ("fully_shard_parallel_size", shard, world, f"the {world} processes"),
        ("expert_parallel_size", ep, shard, f"the {shard} processes that share a copy of the weights"),
        ("ulysses_parallel_size", ulysses, world, f"the {world} processes"),
    ):
        if of % size:
            raise SettingError(f"parallel.{name} {size} does not divide {what}")
    return shard, ep, ulysses


def make_meshes(device_type: str, p: ParallelSettings) -> Meshes:
    """Over all ranks of the default group. Raises SettingError."""
    world = dist.get_world_size()
    shard, ep, ulysses = sizes(p, world)
    copies = world // shard
    return Meshes(
        init_device_mesh(device_type, (copies, shard), mesh_dim_names=("replicate", "shard")),
        init_device_mesh(device_type, (copies, shard // ep, ep), mesh_dim_names=("replicate", "fsdp", "ep")),
        init_device_mesh(device_type, (world // ulysses, ulysses), mesh_dim_names=("data", "ulysses")),
    )
