"""Device meshes: the ranks laid out for the weights, for the experts and for long sequences."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qwen35.config.layout import layout_of
from qwen35.config.schema import ParallelSettings


@dataclass(frozen=True)
class Meshes:
    """All ranks in three meshes; the last dimension varies fastest, so that neighbours share most.

    The ranks of `shard` share one copy of the weights. Of its experts each `ep` rank owns some,
    sharded over `fsdp` (fsdp x ep = shard). The `ulysses` ranks hold parts of the same packed
    sequences, the `data` ranks different ones.
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


def make_meshes(device_type: str, p: ParallelSettings, timeout: float = 1800) -> Meshes:
    """Meshes over all ranks. Raises SettingError.

    timeout: of collectives, in seconds; the default group must have the same.
    """
    layout, limit = layout_of(p, dist.get_world_size()), timedelta(seconds=timeout)
    return Meshes(
        _mesh(device_type, {"replicate": layout.copies, "shard": layout.shard}, limit),
        _mesh(device_type, {"replicate": layout.copies, "fsdp": layout.fsdp, "ep": layout.ep}, limit),
        _mesh(device_type, {"data": layout.data, "ulysses": layout.ulysses}, limit),
    )


def _mesh(device_type: str, sizes: dict[str, int], timeout: timedelta) -> DeviceMesh:
    """As init_device_mesh, whose groups would have torch's default timeout of half an hour."""
    ranks = torch.arange(dist.get_world_size()).view(*sizes.values())
    groups = []
    for dim, (name, size) in enumerate(sizes.items()):
        rank_groups = ranks.movedim(dim, -1).reshape(-1, size).tolist()
        default_group = dist.group.WORLD if len(rank_groups) == 1 else None  # reuse its buffers
        groups.append(
            default_group
            or dist.new_subgroups_by_enumeration(rank_groups, timeout=timeout, group_desc=f"mesh_{name}")[0]
        )
    return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=tuple(sizes))
