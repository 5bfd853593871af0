"""Which node of a run this is, by what the scheduler of a cluster has set for it.

The variables are those that the operators' sources and documents name. None of them says it alone:
RANK is the number of a pod with some schedulers, and that of a process with others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qwen35.errors import SettingError
from qwen35.rank import first_host, number

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    source: str  # who says so
    nnodes: int
    node_rank: int
    address: str | None  # of node 0
    port: int | None = None
    processes: int | None = None  # on each node
    is_starter: bool = True  # of the processes that the scheduler has started on this node


def find_place(environment: Environment, nnodes: int | None = None) -> Place | None:
    """None: no scheduler has set anything, so this node is alone.

    nnodes: what the user says; 1 means alone whatever a scheduler says. Raises SettingError.
    """
    e = {name: value for name, value in environment.items() if value}
    if e.get("LOCAL_RANK", "").isdecimal() and "RANK" in e and "MINDX_TASK_ID" not in e:
        raise SettingError(
            f"RANK={e['RANK']} LOCAL_RANK={e['LOCAL_RANK']}: this process is a rank already, started by torchrun or its"
            " like: run `python -m qwen35.train CONFIG` there"
        )
    if nnodes == 1:
        return None
    readers: list[tuple[set[str], Callable[[Environment], Place | None]]] = [  # the first whose variables are set
        ({"PET_NNODES"}, _kubeflow),
        ({"MINDX_TASK_ID", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}, _mindcluster),
        ({"RANK", "WORLD_SIZE"}, _pods),
        ({"MA_NUM_HOSTS"}, _modelarts),
        ({"RANK_TABLE_FILE", "RANK_ID", "RANK_SIZE"}, _rank_table),
        ({"MS_WORKER_NUM"}, _mindspore),
        ({"SLURM_PROCID"}, _slurm),
    ]
    place = next((read(e) for names, read in readers if names <= e.keys()), None)
    if place and not 0 <= place.node_rank < place.nnodes:
        raise SettingError(f"{place.source} give node {place.node_rank} of {place.nnodes}: there is no such node")
    if place and place.nnodes > 1 and not place.address:
        raise SettingError(f"{place.source} give {place.nnodes} nodes, and not where node 0 is: set MASTER_ADDR")
    if place and nnodes not in (None, place.nnodes):
        raise SettingError(f"NODES={nnodes}, but {place.source} give {place.nnodes} nodes: leave NODES out")
    return place


def _given(e: Environment, name: str) -> int | None:
    return number(e, name) if name in e else None


def _quotient(e: Environment, total: str, part: str) -> int:
    if not number(e, part) or number(e, total) % number(e, part):
        raise SettingError(f"{total}={e[total]} is no multiple of {part}={e[part]}")
    return number(e, total) // number(e, part)


def _kubeflow(e: Environment) -> Place:
    """PyTorchJob and Trainer, which set torchrun's options as PET_…."""
    fewest, _, most = e["PET_NNODES"].partition(":")
    if most not in ("", fewest):
        raise SettingError(f"PET_NNODES={e['PET_NNODES']}: the number of nodes of a run is fixed; set one number")
    nnodes = number({"PET_NNODES": fewest}, "PET_NNODES")
    source, rank = "PET_NNODES and PET_NODE_RANK", e.get("PET_NODE_RANK", "0" if nnodes == 1 else "")
    if not rank:  # an elastic job without a master: its pods are numbered by their names
        source, rank = "PET_NNODES and HOSTNAME", e.get("HOSTNAME", "").rpartition("-")[2]
    if e.get("RANK", rank) != rank:
        raise SettingError(f"RANK={e['RANK']}, but {source} give node {rank}")
    count = e.get("PET_NPROC_PER_NODE", "")
    processes = int(count) if count.isdecimal() else None  # or auto, gpu
    if "WORLD_SIZE" in e and processes and number(e, "WORLD_SIZE") not in (nnodes, nnodes * processes):
        raise SettingError(f"WORLD_SIZE={e['WORLD_SIZE']}, but PET_NNODES={nnodes} and PET_NPROC_PER_NODE={processes}")
    host, _, end = e.get("PET_RDZV_ENDPOINT", "").rpartition(":")
    address = e.get("PET_MASTER_ADDR") or e.get("MASTER_ADDR") or host
    port = e.get("PET_MASTER_PORT") or e.get("MASTER_PORT") or end
    node_rank = number({"PET_NODE_RANK": rank}, "PET_NODE_RANK")
    return Place(
        source, nnodes, node_rank, address, _given({"MASTER_PORT": port} if port else {}, "MASTER_PORT"), processes
    )


def _mindcluster(e: Environment) -> Place:
    """acjob of PyTorch: RANK numbers pods, WORLD_SIZE counts NPUs."""
    nnodes, rank = _quotient(e, "WORLD_SIZE", "LOCAL_WORLD_SIZE"), number(e, "RANK")
    processes = number(e, "LOCAL_WORLD_SIZE")
    source = "RANK and WORLD_SIZE of MindCluster"
    return Place(source, nnodes, rank, e.get("MASTER_ADDR"), _given(e, "MASTER_PORT"), processes)


def _pods(e: Environment) -> Place:
    """Volcano, older Kubeflow, PAI DLC: RANK numbers pods, WORLD_SIZE counts them."""
    nnodes, rank = number(e, "WORLD_SIZE"), number(e, "RANK")
    return Place("RANK and WORLD_SIZE of pods", nnodes, rank, e.get("MASTER_ADDR"), _given(e, "MASTER_PORT"))


def _modelarts(e: Environment) -> Place:
    hosts = [host for host in e.get("VC_WORKER_HOSTS", "").split(",") if host]
    nnodes = number(e, "MA_NUM_HOSTS")
    if hosts and len(hosts) != nnodes:
        raise SettingError(f"MA_NUM_HOSTS={nnodes}, but VC_WORKER_HOSTS={e['VC_WORKER_HOSTS']}")
    rank = number(e, "VC_TASK_INDEX") if nnodes > 1 else 0
    address, port = e.get("MASTER_ADDR") or next(iter(hosts), None), _given(e, "MASTER_PORT")
    source = "MA_NUM_HOSTS and VC_TASK_INDEX"
    return Place(source, nnodes, rank, address, port, _given(e, "MA_NUM_GPUS"), _is_first_card(e))


def _is_first_card(e: Environment) -> bool:
    """In the mode of rank tables ModelArts starts a process a card."""
    return "RANK_TABLE_FILE" not in e or e.get("ASCEND_DEVICE_ID", "0") == "0"


def _rank_table(e: Environment) -> Place:
    if _is_first_card(e) and number(e, "RANK_ID"):
        raise SettingError(f"RANK_ID={e['RANK_ID']}: not the first node; set NODES, NODE_RANK and MASTER_ADDR")
    return Place("RANK_TABLE_FILE and RANK_SIZE", 1, 0, None, None, number(e, "RANK_SIZE"), _is_first_card(e))


def _mindspore(e: Environment) -> Place:
    """acjob of MindSpore."""
    nnodes = _quotient(e, "MS_WORKER_NUM", "MS_LOCAL_WORKER")
    rank, processes = number(e, "MS_NODE_RANK") if nnodes > 1 else 0, number(e, "MS_LOCAL_WORKER")
    source = "MS_WORKER_NUM and MS_NODE_RANK"
    return Place(source, nnodes, rank, e.get("MS_SCHED_HOST"), _given(e, "MS_SCHED_PORT"), processes)


def _slurm(e: Environment) -> Place | None:
    tasks, nodes = (number({name: "1", **e}, name) for name in ("SLURM_NTASKS", "SLURM_NNODES"))
    if tasks == nodes and nodes > 1:
        rank, address = number(e, "SLURM_NODEID"), e.get("MASTER_ADDR") or first_host(e)
        return Place("SLURM_NNODES and SLURM_NODEID", nodes, rank, address, _given(e, "MASTER_PORT"))
    is_task = "SLURM_STEP_ID" in e or number(e, "SLURM_PROCID")  # the batch script itself is none
    if tasks > 1 and is_task:
        raise SettingError(
            f"SLURM_NTASKS={tasks} on SLURM_NNODES={nodes}: a launcher is one task a node (srun --ntasks-per-node=1); with"
            " one task a process start `python -m qwen35.train CONFIG`; NODES=1 starts a run on this node alone"
        )
    return None
