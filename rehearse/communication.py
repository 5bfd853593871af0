"""What is sent between ranks: every collective with its bytes, by the group of its ranks."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from qwen35.parallel.mesh import Meshes
from rehearse.representatives import Moment, Representatives

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
IGNORED = ("_c10d_functional::wait_tensor", "c10d::barrier")
NAMES = {  # a mesh dimension -> its group's name in the report; data ranks exchange nothing by themselves
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
    nodes: int  # over which its ranks are spread


@dataclass
class Traffic:
    calls: int = 0
    sent: float = 0.0  # bytes of rank 0
    between: float = 0.0  # of these, the least that must leave the node, an equal share for each of its ranks

    def add(self, other: "Traffic", times: int) -> None:
        self.calls += other.calls * times
        self.sent += other.sent * times
        self.between += other.between * times


class Communication:
    """An Observer. PhaseTracker sets `moment`."""

    def __init__(self, meshes: Meshes, per_node: int, representatives: Representatives) -> None:
        self.representatives, self.moment = representatives, Moment()
        self.seen: dict[Moment, dict[tuple[str, Group], Traffic]] = defaultdict(lambda: defaultdict(Traffic))
        self.groups: dict[str, Group] = {}
        world = dist.group.WORLD
        assert world is not None
        of_experts = [meshes.experts] if meshes.experts["ep"].size() > 1 else []
        for mesh in (meshes.weights, *of_experts, meshes.tokens):
            for dim in mesh.mesh_dim_names or ():
                if dim in NAMES:
                    self._add(mesh[dim].get_group(), NAMES[dim], per_node)
        if world.group_name not in self.groups:
            self._add(world, "all ranks", per_node)

    def _add(self, group: dist.ProcessGroup, name: str, per_node: int) -> None:
        """Meshes over the same ranks may share one group, which then has all their names."""
        ranks, known = dist.get_process_group_ranks(group), self.groups.get(group.group_name)
        name = f"{known.name}+{name}" if known else name
        self.groups[group.group_name] = Group(name, len(ranks), len({rank // per_node for rank in ranks}))

    def observe(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if func.namespace not in ("c10d", "_c10d_functional"):
            return
        name = func.name().partition(".")[0]
        if name in IGNORED:
            return
        kind = COLLECTIVES.get(name)
        if kind is None:
            raise NotImplementedError(f"{name}: rehearse/communication.py does not know how many bytes it sends")
        group = self.groups.get(_group_name((*args, *kwargs.values())))
        if group is None or group.size == 1:
            return
        sent = _sent(kind, group.size, inputs, outputs)
        self.seen[self.moment][kind, group].add(Traffic(1, sent, between_nodes(kind, group, sent)), 1)

    def check(self) -> None:
        """Raises NotAlikeError."""
        self.representatives.check(self.seen)

    @property
    def traffic(self) -> dict[tuple[str, Group], Traffic]:
        """Of the whole step, by kind of collective and group."""
        found: dict[tuple[str, Group], Traffic] = defaultdict(Traffic)
        for moment, of_moment in self.seen.items():
            for key, traffic in of_moment.items():
                found[key].add(traffic, self.representatives.multiplicity(moment))
        return found


def _group_name(values: tuple) -> str:
    for value in values:
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min"):
            return value
        if hasattr(value, "_type") and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value).group_name
    return ""


def _sent(kind: str, ranks: int, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """The least bytes that a rank sends under any algorithm, where W is the tensor of all n ranks.

    all-gather and reduce-scatter: W (n-1)/n; all-reduce: twice that; all-to-all: what is for other
    ranks; broadcast: W.
    """
    sizes = [x.nbytes for x in (*inputs, *outputs)]
    if kind in ("all-gather", "reduce-scatter"):
        return max(sizes) * (ranks - 1) / ranks
    if kind == "all-reduce":
        return 2 * sum(x.nbytes for x in inputs) * (ranks - 1) / ranks
    if kind == "all-to-all":
        source = inputs[1] if len(inputs) > 1 else inputs[0]  # c10d's own operator takes the output first
        return source.nbytes * (ranks - 1) / ranks
    return float(max(sizes))


def between_nodes(kind: str, group: Group, sent: float) -> float:
    """The part of `sent` that leaves the node if its ranks share the work: the least possible."""
    if group.nodes == 1:
        return 0.0
    per_node = group.size // group.nodes
    whole = sent * group.size / (group.size - 1)
    if kind == "all-to-all":  # every row goes to its own rank
        return whole * (group.size - per_node) / group.size
    return whole * (group.nodes - 1) / group.nodes / per_node


def balanced_counts(counts: Tensor, tokens: int, top_k: int, imbalance: float = 1.0) -> list[list[list[int]]]:
    """kernels/moe_parallel.py's `read_counts` for fake tensors: all experts are chosen equally.

    imbalance: how many times more rows this rank's own experts receive.
    """
    _, ep, experts = counts.shape
    experts -= 1
    rows, total = tokens * top_k, ep * experts
    bounds = [rows * i // total for i in range(total + 1)]
    sent = [[bounds[i + 1] - bounds[i] for i in range(r * experts, (r + 1) * experts)] for r in range(ep)]
    received = [[round(count * imbalance) for count in counts] for counts in sent]
    return [[[*counts, tokens] for counts in both] for both in (sent, received)]
