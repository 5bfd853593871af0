"""Device meshes: the ranks laid out for the weights, for the experts and for long sequences."""

from dataclasses import dataclass
from datetime import timedelta
from functools import partial

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
    data_rank: int
    data_size: int
    ulysses_rank: int
    ulysses_size: int


def make_meshes(device_type: str, p: ParallelSettings, timeout: float = 1800) -> Meshes:
    """Meshes over all ranks. Raises SettingError.

    timeout: of collectives, in seconds; the default group must have the same.
    """
    layout, limit = layout_of(p, dist.get_world_size()), timedelta(seconds=timeout)
    weights = _mesh(device_type, {"replicate": layout.copies, "shard": layout.shard}, limit)
    experts = _mesh(device_type, {"replicate": layout.copies, "fsdp": layout.fsdp, "ep": layout.ep}, limit)
    tokens = _mesh(device_type, {"data": layout.data, "ulysses": layout.ulysses}, limit)
    data_rank, ulysses_rank = tokens.get_local_rank("data"), tokens.get_local_rank("ulysses")
    return Meshes(weights, experts, tokens, data_rank, layout.data, ulysses_rank, layout.ulysses)


def _mesh(device_type: str, sizes: dict[str, int], timeout: timedelta) -> DeviceMesh:
    """As init_device_mesh, whose groups would have torch's default timeout of half an hour."""
    ranks = torch.arange(dist.get_world_size()).view(*sizes.values())
    groups = []
    for dim, (name, size) in enumerate(sizes.items()):
        rank_groups = ranks.movedim(dim, -1).reshape(-1, size).tolist()
        default_group = dist.group.WORLD if len(rank_groups) == 1 else None  # reuse its buffers
        new = partial(dist.new_subgroups_by_enumeration, rank_groups, timeout=timeout, group_desc=f"mesh_{name}")
        groups.append(default_group or new()[0])
    return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=tuple(sizes))
