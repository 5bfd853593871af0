"""What must be the same on all nodes of a run, compared by its ranks before anything is loaded.

Versions, source code, settings, environment variables, the files that the run reads, and whether
all nodes see the same save folder. One rank of each node reads, over the hosts' network, so that
this works under every launcher, and where the accelerators' own collectives do not.

Clocks that differ are reported, for readers of logs, file times and checkpoints' dates, but are
never a reason to stop: no computation depends on the clock of another node.
"""

import contextlib
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from qwen35.checkpoint.dcp_folder import newest_checkpoint
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.tensor_file import read_header
from qwen35.config.load import flat_settings
from qwen35.config.schema import Settings, dataset_entries
from qwen35.device import host_group
from qwen35.errors import USER_ERRORS, UserError, one_line, visible
from qwen35.log import logger
from qwen35.tools.stack import cann_version
from qwen35.wording import named

# packages of which two releases may compute different results
PACKAGES = "torch torch-npu triton-ascend numpy pillow tokenizers jinja2 safetensors".split()
PREFIXES = ("HCCL_", "GLOO_")  # of environment variables that must be the same for all processes
VARIABLES = ("CLOSE_MATMUL_K_SHIFT", "NPU_ASD_ENABLE")
PER_NODE_VARIABLES = ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")  # network cards differ between nodes
PER_NODE_SETTINGS = tuple(  # a local disk of each node
    f"data.{param}.basic_parameters.cache_dir" for param in ("dataset_param", "val_dataset_param")
)
WHOLE_BYTES = 1 << 25  # of a file that is fingerprinted whole; of a larger one both ends and samples are
END_BYTES = 1 << 16  # at each end
SAMPLE_BYTES, STRIDE = 64, 1 << 24  # of each sample, and from one to the next
MAX_FILES = 64  # of a folder that are fingerprinted, spread over it; the number of files is compared too
NONE = "none"
MAX_CLOCK_SKEW = 5.0  # seconds that clocks may differ without a note
FILE_TIMEOUT = 10.0  # seconds until a new file must be visible on all nodes: network file systems cache listings


class NodesError(UserError):
    """The nodes do not agree."""


def ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def compare_nodes(settings: Settings, timeout: float) -> None:
    """Every rank calls it; one node has nothing to compare. Raises NodesError on all ranks."""
    here, rank, save = ranks_here(), dist.get_rank(), Path(settings.training.save)
    if dist.get_world_size() == here:
        return
    group, is_reader = host_group(timeout), rank % here == 0
    with contextlib.ExitStack() as stack:
        marker = _share(group, lambda: stack.enter_context(marker_file(save)) if rank == 0 else "")[0]
        clocks = _share(group, time.time)
        found = _share(group, lambda: facts(settings) if is_reader else {})
        differences = disagreements(dict(enumerate(found[::here])), here)
        for line in differences if is_reader else ():
            print(visible(line), file=sys.stderr, flush=True)
        if differences:
            count = "one thing" if len(differences) == 1 else f"{len(differences)} things"
            raise NodesError(f"the nodes differ in {count}, listed above: nothing was loaded")
        seen = _share(group, lambda: not is_reader or sees_marker(save, marker))
    if blind := [number // here for number, is_seen in enumerate(seen) if not is_seen]:
        raise NodesError(
            f"{named('node', blind)} {'does' if len(blind) == 1 else 'do'} not see what node 0 writes in {save}: name a"
            " training.save on a file system that all nodes share"
        )
    for node, clock in enumerate(clocks[::here]):
        if abs(ahead := clock - clocks[0]) > MAX_CLOCK_SKEW:
            skew = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} node 0's"
            logger.info(
                f"note: the clock of node {node} is {skew}; training is unaffected, times in logs and files differ"
            )


def _share(group: dist.ProcessGroup, action: Callable[[], Any]) -> list[Any]:
    """What an action returns on each rank. Raises NodesError on all ranks if it fails on one."""
    try:
        own = action(), ""
    except USER_ERRORS as error:
        own = None, one_line(error)
    gathered: list[tuple[Any, str]] = [own] * dist.get_world_size()
    dist.all_gather_object(gathered, own, group=group)
    for rank, (_, failure) in enumerate(gathered):
        if failure:
            raise NodesError(f"node {rank // ranks_here()}: {failure}")
    return [value for value, _ in gathered]


def facts(settings: Settings, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Name -> value of all that must agree. Reads the ends of files only. Raises OSError."""
    home = environment.get("ASCEND_HOME_PATH")
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "the processor": platform.machine(),
        **{name: _version(name) for name in PACKAGES},
        "CANN": (home and cann_version(Path(home))) or NONE,
        "the code of qwen35/ and kernels/": sources(Path(__file__).parents[2]),
        **{k: str(v) for k, v in flat_settings(settings).items() if k not in PER_NODE_SETTINGS},
        **{k: v for k, v in environment.items() if _must_agree(k)},
        **files(settings),
    }


def _version(package: str) -> str:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return NONE


def _must_agree(name: str) -> bool:
    return (name.startswith(PREFIXES) or name in VARIABLES) and name not in PER_NODE_VARIABLES


def sources(root: Path) -> str:
    """A digest of all Python files of the project."""
    digest = blake2b(digest_size=6)
    for file in sorted(path for folder in ("qwen35", "kernels") for path in (root / folder).rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def files(settings: Settings) -> dict[str, str]:
    """Name -> fingerprint of the data files, the model folder's files, and the weights."""
    t = settings.training
    params = [settings.data.dataset_param, settings.data.val_dataset_param]
    datasets = [param.basic_parameters.dataset for param in params if param]
    records = [Path(entry.file) for dataset in datasets for entry in dataset_entries(dataset)]
    folders = [Path(name) for name in (settings.model.model_name_or_path, settings.tokenizer_dir) if name]
    folders += [Path(t.init_from_hf_path)] if t.init_from_hf_path else []
    if t.load:
        folders += [Path(t.load), newest_checkpoint(t.load) or Path(t.load)]
    found = {str(file): fingerprint(file) for file in (*records, *(path for path in folders if path.is_file()))}
    for folder in dict.fromkeys(path for path in folders if not path.is_file()):
        names = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        found[f"{folder}/"] = f"{len(names)} files" if folder.is_dir() else NONE
        step = -(-len(names) // MAX_FILES) or 1
        found |= {str(file): fingerprint(file) for file in names[::step]}
    return found


def fingerprint(file: Path) -> str:
    """The size and a hash of all of a small file, and of samples of a larger one, which is cheap.

    The fine-tunings of one model have headers of the same length, and where a tower is frozen or
    adapters were merged the same ends, so each tensor of a safetensors file has a sample, too.
    """
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            places = [(0, size)] if size <= WHOLE_BYTES else _samples(file, size)
            digest = blake2b(digest_size=6)
            for begin, length in places:
                stream.seek(begin)
                digest.update(stream.read(length))
    except (FileNotFoundError, NotADirectoryError):
        return NONE
    return f"{size:,} bytes ({digest.hexdigest()})"


def _samples(file: Path, size: int) -> list[tuple[int, int]]:
    """(begin, length) of what is read of a large file, in order."""
    begins = {*range(0, size, STRIDE)}
    if file.suffix == ".safetensors":
        with contextlib.suppress(CheckpointError):  # a damaged file is reported when it is loaded
            begins |= {entry.begin + entry.spec.nbytes // 2 for entry in read_header(file).values()}
    return [(0, END_BYTES), *((begin, SAMPLE_BYTES) for begin in sorted(begins)), (size - END_BYTES, END_BYTES)]


def disagreements(facts: Mapping[int, Mapping[str, str]], ranks: int) -> list[str]:
    """A line for each fact and each value that differs from node 0's. facts: by node."""
    found = []
    for name in dict.fromkeys(name for node_facts in facts.values() for name in node_facts):
        expected = facts[0].get(name, NONE)
        nodes_by_value: dict[str, list[int]] = {}
        for node, node_facts in sorted(facts.items()):
            if (value := node_facts.get(name, NONE)) != expected:
                nodes_by_value.setdefault(value, []).append(node)
        for value, nodes in nodes_by_value.items():
            who = f"{named('node', nodes)} ({named('rank', [ranks * node for node in nodes])})"
            found.append(f"{who} {'has' if len(nodes) == 1 else 'have'} {name}: {value}; node 0 (rank 0): {expected}")
    return found


@contextlib.contextmanager
def marker_file(folder: Path) -> Iterator[str]:
    """The name of a new file in `folder` (made if need be), for the block. Raises OSError."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f".seen-{secrets.token_hex(8)}"
    marker.touch()
    try:
        yield marker.name
    finally:
        marker.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a folder that is used by now stays
            for path in made:
                path.rmdir()


def sees_marker(folder: Path, marker: str) -> bool:
    """Whether node 0's marker file appears in `folder` here. Raises OSError if not writable."""
    deadline = time.monotonic() + FILE_TIMEOUT
    names: set[str] = set()
    while True:
        for path in (folder.parent, folder):  # listing a folder makes a network file system refresh it
            with contextlib.suppress(OSError):
                names = {entry.name for entry in path.iterdir()}
        if folder.is_dir() and marker in names:
            probe = folder / f"{marker}-{secrets.token_hex(4)}"
            probe.touch()
            probe.unlink()
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
