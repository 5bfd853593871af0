"""What must be the same on all machines of a run, and where it is not: versions, sources, settings, environment, files."""

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

PACKAGES = (
    "torch torch-npu triton-ascend numpy pillow tokenizers jinja2 safetensors".split()
)  # whose other release may compute otherwise
PREFIXES = ("HCCL_", "GLOO_")  # of variables that all processes must understand alike
VARIABLES = ("CLOSE_MATMUL_K_SHIFT", "NPU_ASD_ENABLE")
OF_ONE_MACHINE = ("HCCL_IF_IP", "HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")  # another network card, another name
SETTINGS_OF_ONE_MACHINE = tuple(  # on a disk of its own
    f"data.{param}.basic_parameters.cache_dir" for param in ("dataset_param", "val_dataset_param")
)
ENDS = 1 << 16  # bytes at each end of a file that are looked at
MOST = 64  # files of a folder that are looked into; of the rest the names count, and how many there are
LATEST = "latest_checkpointed_iteration.txt"  # as in checkpoint/dcp_folder.py, which takes seconds to import
NONE = "none"
OTHER = "something else (both values are told where RENDEZVOUS_SECRET is set)"


def facts(settings: Settings, processes: int, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Name -> value, of all that must agree. Reads the ends of files alone, so it takes a moment. Raises OSError."""
    return {
        "NPUS_PER_NODE": str(processes),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "the processor": platform.machine(),
        **{name: _version(name) for name in PACKAGES},
        "CANN": _cann(environment),
        "the code of qwen35/ and kernels/": sources(Path(__file__).parents[2]),
        **{k: str(v) for k, v in flat_settings(settings).items() if k not in SETTINGS_OF_ONE_MACHINE},
        **{k: v for k, v in environment.items() if _must_agree(k)},
        **files(settings),
    }


def _version(package: str) -> str:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return NONE


def _cann(environment: Mapping[str, str]) -> str:
    from qwen35.tools.doctor.stack import cann_version

    home = environment.get("ASCEND_HOME_PATH")
    return (cann_version(Path(home)) if home else None) or NONE


def _must_agree(name: str) -> bool:
    return (name.startswith(PREFIXES) or name in VARIABLES) and name not in OF_ONE_MACHINE


def sources(root: Path) -> str:
    """Changes with any line of the code."""
    digest = blake2b(digest_size=6)
    for file in sorted(path for folder in ("qwen35", "kernels") for path in (root / folder).rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def files(settings: Settings) -> dict[str, str]:
    """The records, the model folder, and the weights: name -> size and what its two ends hold."""
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
        step = -(-len(names) // MOST) or 1
        found |= {str(file): fingerprint(file) for file in names[::step]}
    return found


def _latest(folder: Path) -> list[Path]:
    """The checkpoint that is loaded from the folder of a run, or of a conversion."""
    try:
        word = read_text(folder / LATEST, UserError).strip()
    except UserError:  # no such file, or one that names nothing: what is loaded is then found without it
        return []
    is_step = re.fullmatch("[0-9]{1,18}", word)
    return [folder / (f"iter_{int(word):07d}" if is_step else "release")]


def fingerprint(file: Path) -> str:
    """Size, and a hash of the first and the last 64 KiB: enough to tell another file, and cheap for one of any size."""
    try:
        with file.open("rb") as stream:
            digest = blake2b(stream.read(ENDS), digest_size=6)
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - ENDS))
            digest.update(stream.read(ENDS))
    except (FileNotFoundError, NotADirectoryError):
        return NONE
    return f"{size:,} bytes ({digest.hexdigest()})"


class Disagreement(NamedTuple):
    """Told on machine 0, and on those that it names."""

    machines: Sequence[int]
    line: str


def disagreements(facts: Mapping[int, Mapping[str, str]]) -> list[Disagreement]:
    """Machine -> its facts. One for each fact and each value that is not machine 0's, with the machines that have it."""
    found = []
    for name in dict.fromkeys(name for own in facts.values() for name in own):
        expected = facts[0].get(name, NONE)
        others: dict[str, list[int]] = {}
        for machine, own in sorted(facts.items()):
            if (value := own.get(name, NONE)) != expected:
                others.setdefault(value, []).append(machine)
        for value, who in others.items():
            verb = "has" if len(who) == 1 else "have"
            found.append(Disagreement(who, f"{machines(who)} {verb} {name}: {value}; machine 0: {expected}"))
    return found


def hashed(facts: Mapping[str, str], salt: str) -> dict[str, str]:
    """Names and values, told only to who has the same."""
    return {_hash(name, salt): _hash(value, salt) for name, value in facts.items()}


def unhashed(found: Mapping[str, str], own: Mapping[str, str], salt: str) -> dict[str, str]:
    """Another machine's hashed facts, beside those of this one, as far as they are the same."""
    known = {_hash(name, salt): name for name in own}
    facts = {
        known[key]: own[known[key]] if value == _hash(own[known[key]], salt) else OTHER
        for key, value in found.items()
        if key in known
    }
    more = len(found) - len(facts)
    return facts | ({"what machine 0 has not": f"{more} things"} if more else {})


def _hash(text: str, salt: str) -> str:
    return blake2b(
        text.encode(errors="surrogatepass"), key=salt.encode(errors="replace")[:64], digest_size=16
    ).hexdigest()


def machines(numbers: Iterable[int]) -> str:
    """[1] -> "machine 1", [1, 2, 3, 5] -> "machines 1 to 3, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)
    return f"machine{'s' * (sum(map(len, runs)) > 1)} {words}"


@contextlib.contextmanager
def present(folder: Path) -> Iterator[str]:
    """A file of a name that nobody has seen in a folder (made if need be), until the block ends: its name. Raises OSError."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".seen-{secrets.token_hex(8)}"
    token.touch()
    try:
        yield token.name
    finally:
        token.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another has come in, or it is no folder of ours
            for path in made:
                path.rmdir()


def seen(folder: Path, token: str, patience: float) -> bool:
    """Whether machine 0's token is in the folder here too; if so, this machine may write there. Raises OSError if not."""
    end = time.monotonic() + patience
    names: set[str] = set()
    while True:
        for above in (folder.parent, folder):  # opening a folder has a network's file system look again
            with contextlib.suppress(OSError):
                names = {entry.name for entry in above.iterdir()}
        if folder.is_dir() and token in names:
            own = folder / f"{token}-{secrets.token_hex(4)}"
            own.touch()
            own.unlink()
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
