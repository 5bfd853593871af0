"""Who shares what: the ranks laid out for the weights, for the experts, and for long sequences."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from qwen35.config.layout import layout_of
from qwen35.config.schema import ParallelSettings


@dataclass(frozen=True)
class Meshes:
    """All ranks in three layouts. Ranks of the last dimension are neighbours.

    FSDP shards a copy of the weights over the `shard` ranks. Expert parallelism first divides the
    experts among the `ep` ranks; FSDP shards each of these parts over the `fsdp` ranks (fsdp x ep =
    shard). The `ulysses` ranks share the same packed sequences, each `data` rank has its own.
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
    """Over all ranks of the default group, which must have the same timeout: seconds that a collective waits for the slowest.

    Raises SettingError.
    """
    of, patience = layout_of(p, dist.get_world_size()), timedelta(seconds=timeout)
    return Meshes(
        _mesh(device_type, {"replicate": of.copies, "shard": of.shard}, patience),
        _mesh(device_type, {"replicate": of.copies, "fsdp": of.fsdp, "ep": of.ep}, patience),
        _mesh(device_type, {"data": of.data, "ulysses": of.ulysses}, patience),
    )


def _mesh(device_type: str, sizes: dict[str, int], timeout: timedelta) -> DeviceMesh:
    """As init_device_mesh makes it, whose groups would have torch's own half hour whatever the default group has."""
    ranks = torch.arange(dist.get_world_size()).view(*sizes.values())
    groups = []
    for dim, (name, size) in enumerate(sizes.items()):
        lines = ranks.movedim(dim, -1).reshape(-1, size).tolist()
        everyone = dist.group.WORLD if len(lines) == 1 else None  # a second one would need buffers of its own
        groups.append(
            everyone or dist.new_subgroups_by_enumeration(lines, timeout=timeout, group_desc=f"mesh_{name}")[0]
        )
    return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=tuple(sizes))
