"""What must be the same on all nodes of a run, and where it differs.

Versions, source code, settings, environment variables, and the files that the run reads.
"""

import contextlib
import os
import platform
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from qwen35.config.load import flat_settings
from qwen35.config.schema import Settings, dataset_entries
from qwen35.errors import UserError, read_text

# packages of which two releases may compute different results
PACKAGES = "torch torch-npu triton-ascend numpy pillow tokenizers jinja2 safetensors".split()
PREFIXES = ("HCCL_", "GLOO_")  # of environment variables that must be the same for all processes
VARIABLES = ("CLOSE_MATMUL_K_SHIFT", "NPU_ASD_ENABLE")
PER_NODE_VARIABLES = ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")  # network cards differ between nodes
PER_NODE_SETTINGS = tuple(  # a local disk of each node
    f"data.{param}.basic_parameters.cache_dir" for param in ("dataset_param", "val_dataset_param")
)
END_BYTES = 1 << 16  # at each end of a file that go into its fingerprint
MAX_FILES = 64  # of a folder that are fingerprinted, spread over it; the number of files is compared too
LATEST = "latest_checkpointed_iteration.txt"  # as in checkpoint/dcp_folder.py, which takes seconds to import
NONE = "none"
DIFFERENT_VALUE = "something else (both values are shown where RENDEZVOUS_SECRET is set)"


def facts(settings: Settings, processes: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Name -> value of all that must agree. Reads the ends of files only. Raises OSError."""
    return {
        "NPUS_PER_NODE": str(processes),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "the processor": platform.machine(),
        **{name: _version(name) for name in PACKAGES},
        "CANN": _cann(environment),
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


def _cann(environment: Mapping[str, str]) -> str:
    from qwen35.tools.stack import cann_version

    home = environment.get("ASCEND_HOME_PATH")
    return (cann_version(Path(home)) if home else None) or NONE


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
        folders += [Path(t.load), *_latest(Path(t.load))]
    found = {str(file): fingerprint(file) for file in (*records, *(path for path in folders if path.is_file()))}
    for folder in dict.fromkeys(path for path in folders if not path.is_file()):
        names = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        found[f"{folder}/"] = f"{len(names)} files" if folder.is_dir() else NONE
        step = -(-len(names) // MAX_FILES) or 1
        found |= {str(file): fingerprint(file) for file in names[::step]}
    return found


def _latest(folder: Path) -> list[Path]:
    """The checkpoint that a run, or a conversion, names as its newest: no or one folder."""
    try:
        name = read_text(folder / LATEST, UserError).strip()
    except UserError:  # the checkpoint to load is then found without this file
        return []
    is_step = re.fullmatch("[0-9]{1,18}", name)
    return [folder / (f"iter_{int(name):07d}" if is_step else "release")]


def fingerprint(file: Path) -> str:
    """The size and a hash of the first and last 64 KiB: cheap for a file of any size."""
    try:
        with file.open("rb") as stream:
            digest = blake2b(stream.read(END_BYTES), digest_size=6)
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - END_BYTES))
            digest.update(stream.read(END_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return NONE
    return f"{size:,} bytes ({digest.hexdigest()})"


class Disagreement(NamedTuple):
    """Logged on node 0 and on the nodes that it names."""

    nodes: Sequence[int]
    line: str


def disagreements(facts: Mapping[int, Mapping[str, str]]) -> list[Disagreement]:
    """One for each fact and each value that differs from node 0's. facts: by node."""
    found = []
    for name in dict.fromkeys(name for node_facts in facts.values() for name in node_facts):
        expected = facts[0].get(name, NONE)
        nodes_by_value: dict[str, list[int]] = {}
        for node, node_facts in sorted(facts.items()):
            if (value := node_facts.get(name, NONE)) != expected:
                nodes_by_value.setdefault(value, []).append(node)
        for value, nodes in nodes_by_value.items():
            verb = "has" if len(nodes) == 1 else "have"
            found.append(Disagreement(nodes, f"{node_names(nodes)} {verb} {name}: {value}; node 0: {expected}"))
    return found


def hashed(facts: Mapping[str, str], salt: str) -> dict[str, str]:
    """Hashes of the names and values, readable only for a node that has the same ones."""
    return {_hash(name, salt): _hash(value, salt) for name, value in facts.items()}


def unhashed(hashes: Mapping[str, str], local: Mapping[str, str], salt: str) -> dict[str, str]:
    """The facts behind another node's hashes, as far as the local facts reveal them."""
    names = {_hash(name, salt): name for name in local}
    facts = {
        names[key]: local[names[key]] if value == _hash(local[names[key]], salt) else DIFFERENT_VALUE
        for key, value in hashes.items()
        if key in names
    }
    unknown = len(hashes) - len(facts)
    return facts | ({"what node 0 has not": f"{unknown} things"} if unknown else {})


def _hash(text: str, salt: str) -> str:
    return blake2b(
        text.encode(errors="surrogatepass"), key=salt.encode(errors="replace")[:64], digest_size=16
    ).hexdigest()


def node_names(nodes: Iterable[int]) -> str:
    """[1] -> "node 1", [1, 2, 3, 5] -> "nodes 1 to 3, 5"."""
    ranges: list[list[int]] = []
    for node in sorted(nodes):
        if ranges and node == ranges[-1][-1] + 1:
            ranges[-1].append(node)
        else:
            ranges.append([node])
    names = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in ranges)
    return f"node{'s' * (sum(map(len, ranges)) > 1)} {names}"


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


def sees_marker(folder: Path, marker: str, timeout: float) -> bool:
    """Whether node 0's marker file appears in `folder` here. Raises OSError if not writable."""
    deadline = time.monotonic() + timeout
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
