"""What goes over the wire: every collective with its bytes, by the group of ranks that takes part."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from qwen35.parallel.mesh import Meshes
from rehearse.representatives import Cut, Moment

# operator -> kind; the second column says how many bytes rank 0 must send at least, see `_sent`
COLLECTIVES = {
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_into_tensor_coalesced_": "all-gather",
    "c10d::allgather_": "all-gather",
    "_c10d_functional::all_gather_into_tensor": "all-gather",
    "_c10d_functional::all_gather_into_tensor_out": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "_c10d_functional::reduce_scatter_tensor": "reduce-scatter",
    "c10d::allreduce_": "all-reduce",
    "_c10d_functional::all_reduce": "all-reduce",
    "_c10d_functional::all_reduce_": "all-reduce",
    "c10d::alltoall_base_": "all-to-all",
    "c10d::alltoall_": "all-to-all",
    "_c10d_functional::all_to_all_single": "all-to-all",
    "c10d::broadcast_": "broadcast",
    "_c10d_functional::broadcast": "broadcast",
}
HARMLESS = ("_c10d_functional::wait_tensor", "c10d::barrier")
NAMES = {  # of a mesh's dimension in what is printed; data ranks have nothing to say to each other
    "shard": "fsdp",
    "replicate": "replicas",
    "fsdp": "experts' fsdp",
    "ep": "ep",
    "ulysses": "ulysses",
}


@dataclass(frozen=True)
class Group:
    name: str
    size: int
    nodes: int  # that its ranks lie on


@dataclass
class Traffic:
    calls: int = 0
    sent: float = 0.0  # bytes of rank 0
    between: float = (
        0.0  # of these, the least that has to leave its node, shared evenly by the node's ranks of the group
    )

    def add(self, other: "Traffic", times: int) -> None:
        self.calls += other.calls * times
        self.sent += other.sent * times
        self.between += other.between * times


class Wire:
    """An Observer. `moment` is set by who knows it."""

    def __init__(self, meshes: Meshes, per_node: int, cut: Cut) -> None:
        self.cut, self.moment = cut, Moment()
        self.seen: dict[Moment, dict[tuple[str, Group], Traffic]] = defaultdict(lambda: defaultdict(Traffic))
        self.groups: dict[str, Group] = {}
        world = dist.group.WORLD
        assert world is not None
        split = [meshes.experts] if meshes.experts["ep"].size() > 1 else []
        for mesh in (meshes.weights, *split, meshes.tokens):
            for dim in mesh.mesh_dim_names or ():
                if dim in NAMES:
                    self._add(mesh[dim].get_group(), NAMES[dim], per_node)
        if world.group_name not in self.groups:
            self._add(world, "all ranks", per_node)

    def _add(self, group: dist.ProcessGroup, name: str, per_node: int) -> None:
        """Meshes over the same ranks may have one group: it has all their names."""
        ranks, known = dist.get_process_group_ranks(group), self.groups.get(group.group_name)
        name = f"{known.name}+{name}" if known else name
        self.groups[group.group_name] = Group(name, len(ranks), len({rank // per_node for rank in ranks}))

    def saw(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if func.namespace not in ("c10d", "_c10d_functional") or func.name().partition(".")[0] in HARMLESS:
            return
        name = func.name().partition(".")[0]
        kind = COLLECTIVES.get(name)
        if kind is None:
            raise NotImplementedError(f"{name}: how many bytes it sends is not known here (rehearse/communication.py)")
        group = self.groups.get(_group_name((*args, *kwargs.values())))
        if group is None or group.size == 1:
            return
        sent = _sent(kind, group.size, args, inputs, outputs)
        self.seen[self.moment][kind, group].add(Traffic(1, sent, between_nodes(kind, group, sent)), 1)

    def check(self) -> None:
        """Raises UnevenError."""
        self.cut.check(self.seen)

    @property
    def traffic(self) -> dict[tuple[str, Group], Traffic]:
        """Of the whole step, by kind of collective and group."""
        found: dict[tuple[str, Group], Traffic] = defaultdict(Traffic)
        for moment, of_moment in self.seen.items():
            for key, traffic in of_moment.items():
                found[key].add(traffic, self.cut.times(moment))
        return found


def _group_name(values: tuple) -> str:
    for value in values:
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min"):
            return value
        if hasattr(value, "_type") and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value).group_name
    return ""


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sent(kind: str, ranks: int, args: tuple, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """Bytes that a rank sends at least, whatever the algorithm: of the whole tensor W, all ranks' parts together.

    all-gather, reduce-scatter W (n-1)/n; all-reduce twice that; all-to-all what is not for the rank itself; broadcast W.
    """
    sizes = [size_of(x) for x in (*inputs, *outputs)]
    if kind in ("all-gather", "reduce-scatter"):
        return max(sizes) * (ranks - 1) / ranks
    if kind == "all-reduce":
        return 2 * sum(size_of(x) for x in inputs) * (ranks - 1) / ranks
    if kind == "all-to-all":
        given = inputs[1] if len(inputs) > 1 else inputs[0]  # c10d's own takes the output first
        return size_of(given) * (ranks - 1) / ranks
    return float(max(sizes))


def between_nodes(kind: str, group: Group, sent: float) -> float:
    """Of `sent`, what leaves the node where the ranks of a node first share their work: the least for any algorithm."""
    if group.nodes == 1:
        return 0.0
    here = group.size // group.nodes
    whole = sent * group.size / (group.size - 1)
    if kind == "all-to-all":  # every row goes to its own rank
        return whole * (group.size - here) / group.size
    return whole * (group.nodes - 1) / group.nodes / here
