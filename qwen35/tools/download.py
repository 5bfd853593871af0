"""A model of a hub into a folder: `python -m qwen35.tools.download Qwen/Qwen3.5-4B [--source hf|modelscope] [--out FOLDER]`.

The files gather in a hidden folder beside the one that they are for, which gets that name when all are there and checked: what
bears the model's name is whole. The same command goes on where an earlier one was stopped.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from shutil import disk_usage
from typing import Any

from tqdm import tqdm

from qwen35.checkpoint.folders import flush
from qwen35.checkpoint.hf_read import HFFolder
from qwen35.checkpoint.lock import LOCK, holding
from qwen35.errors import USER_ERRORS, Parser, complain, naming, one_line
from qwen35.model.config import ConfigError, load_config
from qwen35.tools.hub import HUBS, MODEL, DownloadError, Hub, HubFile, UnreachableError

FOLDER, CONFIG = Path("ckpt/hf_path"), "config.json"
AT_ONCE = 8  # files
TRIES = 6  # in a row that bring nothing
PAUSE = 1.0  # seconds after the first of them, and twice as long after each other one
PIECE = 2**20
ROOM = 2**28  # bytes to be left free on the disk

Progress = Callable[[int], object]  # is told the bytes of each piece


class _StoppedError(Exception):
    """Another file's download has failed, or the user has had enough."""


def download(model: str, hub: Hub, folder: Path) -> str:
    """Bring a model into `folder`, or compare one that is there with the hub's. Returns a line. Raises UserError, OSError."""
    try:
        files = hub.files(model)
    except UnreachableError as error:
        if folder.exists():
            raise UnreachableError(f"{error}; {folder} is there, but was not compared with it") from None
        raise UnreachableError(
            f"{error}; put {model}'s config, tokenizer, processor and safetensors into {folder} by hand, or try"
            " SOURCE=modelscope, or HF_ENDPOINT=<a mirror>"
        ) from None
    total = sum(file.size for file in files)
    told, as_the_hub = f"{len(files)} files, {total:,} bytes", f"all as {hub.host} has them"
    if unchecked := sum(file.checksum is None for file in files):
        as_the_hub += f", but {unchecked} without a checksum there are compared by size alone"
    if folder.is_symlink():  # the finished folder is renamed, and a link cannot be replaced by a folder
        folder = Path(os.path.realpath(folder))
    beside = folder.with_name(f".{folder.name}.download")
    there_already = f"{folder} is there already: {told}, {as_the_hub}"
    if _is_there(folder):
        _compare(files, folder, beside)
        return there_already
    with holding(beside) as warning:
        if _is_there(folder):  # another job has brought it, while this one waited
            _compare(files, folder, beside)
            return there_already
        there = sum(_size(beside / file.name) for file in files)
        lines = [
            f"{model} from {hub.host} to {folder}: {told}",
            f"{there:,} bytes are here already" if there else "",
            warning,
        ]
        print(*filter(None, lines), sep="\n", flush=True)
        _check_room(beside, total - there)
        _remove_others(files, beside)
        with _bar(total, folder.name) as progress:
            fetch = partial(_fetch_all, hub, beside, progress)
            fetch([file for file in files if file.name == CONFIG])
            try:
                load_config(beside)  # a model that cannot be trained here is not worth the rest
            except ConfigError:
                (beside / CONFIG).unlink(missing_ok=True)
                raise
            fetch([file for file in files if file.name != CONFIG])
        HFFolder(beside)  # all that its index names is there
        for file in files:
            flush(beside / file.name)
        (beside / LOCK).unlink()
        beside.rename(folder)
        flush(folder.parent)
    return f"{folder}: {told}, {as_the_hub}"


def _is_there(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _compare(files: Sequence[HubFile], folder: Path, beside: Path) -> None:
    """Raises DownloadError if a folder that is there lacks one of the hub's files, or has another."""
    there = [file for file in files if _size(folder / file.name) == file.size]
    wrong = [f"{file.name} is {_size(folder / file.name)} bytes of {file.size}" for file in files if file not in there]
    with (
        _bar(sum(file.size for file in there), f"compare {folder.name}") as progress,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        for file, hasher in zip(there, pool.map(lambda f: _hashed(folder / f.name, f, progress), there), strict=True):
            if not _fits(file, hasher):
                wrong.append(f"{file.name} is another")
    if wrong:
        few = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise DownloadError(
            f"{folder} is there, and not as the hub has it: {few}; move it away, or to {beside}, where what is right is kept"
        )


def _check_room(folder: Path, needed: int) -> None:
    free = disk_usage(folder).free
    if needed and needed + ROOM > free:
        raise DownloadError(f"{folder.parent}: {needed:,} bytes are to come, and {free:,} are free on that disk")


def _remove_others(files: Sequence[HubFile], folder: Path) -> None:
    """Of an earlier state of the model."""
    names = {LOCK, *(file.name for file in files)}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink()


@contextmanager
def _bar(total: int, title: str) -> Iterator[Progress]:
    """A progress bar on a terminal; yields what any thread calls for each piece."""
    lock, hidden = threading.Lock(), not sys.stderr.isatty()
    with tqdm(
        total=total, desc=title, unit="B", unit_scale=True, unit_divisor=1024, disable=hidden, leave=False
    ) as bar:

        def update(count: int) -> None:
            with lock:
                bar.update(count)

        yield update


# -- one file -----------------------------------------------------------------------------------------------------------


def _fetch_all(hub: Hub, folder: Path, progress: Progress, files: Sequence[HubFile]) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(_fetch, hub, file, folder / file.name, progress, stop) for file in files]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:  # KeyboardInterrupt too
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(hub: Hub, file: HubFile, path: Path, progress: Progress, stop: threading.Event) -> None:
    """Fill `path` up from what an earlier run left there; if that then does not fit, fetch it anew. Raises DownloadError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _size(path) > file.size or file.checksum is None:
        path.unlink(missing_ok=True)  # without a checksum nothing tells what is left of an older revision from this one
    for left in (_size(path), 0):
        hasher = _hashed(path, file, progress)
        _append(hub, file, path, hasher, progress, stop)
        if _fits(file, hasher):
            return
        path.unlink()
        progress(-file.size)
        if not left:
            break
    raise DownloadError(
        f"{file.name}: what {hub.host} sends has not the checksum that it gives, and was removed; try again, or another SOURCE"
    )


def _append(hub: Hub, file: HubFile, path: Path, hasher: Any, progress: Progress, stop: threading.Event) -> None:
    """Raises UnreachableError after TRIES that bring nothing, else OSError of the disk."""
    failures = 0
    with naming(path), path.open("ab") as out:
        while (have := out.tell()) < file.size:
            pieces = _pieces(hub, file, have)
            while not stop.is_set():
                try:
                    piece = next(pieces, None)
                except (OSError, HTTPException) as error:
                    failures += 1
                    if failures == TRIES:
                        raise UnreachableError(
                            f"{hub.host} brings no more of {file.name}, after {out.tell():,} of {file.size:,} bytes:"
                            f" {one_line(error)}; the same command goes on from there"
                        ) from None
                    stop.wait(PAUSE * 2 ** (failures - 1))
                    break
                if piece is None:
                    break
                out.write(piece)
                out.flush()
                hasher.update(piece)
                progress(len(piece))
                failures = 0
            if stop.is_set():
                raise _StoppedError


def _pieces(hub: Hub, file: HubFile, start: int) -> Iterator[bytes]:
    """The bytes of a file from `start` to its end. Raises OSError, HTTPException, DownloadError."""
    with hub.open(file.url, start) as answer:
        left, skip = file.size - start, 0
        if start and answer.status != 206:
            skip = start  # it sends the whole file, whatever was asked
        elif start and not (answer.headers["Content-Range"] or "").startswith(f"bytes {start}-"):
            raise OSError("it sends another part of the file than was asked for")
        while left:
            piece = answer.read1(min(PIECE, skip or left))  # what is there, without waiting for more
            if not piece:
                raise OSError("the connection ended early")
            if skip:
                skip -= len(piece)
            else:
                left -= len(piece)
                yield piece


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _hashed(path: Path, file: HubFile, progress: Progress) -> Any:
    """The hash of what is there of a file."""
    hasher = file.hasher()
    if path.is_file():
        with path.open("rb") as content:
            while piece := content.read(PIECE):
                hasher.update(piece)
                progress(len(piece))
    return hasher


def _fits(file: HubFile, hasher: Any) -> bool:
    return file.checksum is None or hasher.hexdigest() == file.checksum[1]


# -- the command --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m qwen35.tools.download", description=__doc__)
    add = parser.add_argument
    add("model", help="its name on the hub: Qwen/Qwen3.5-4B")
    add("--source", choices=HUBS, default="hf", help="the hub; default: hf")
    add("--out", type=Path, help=f"folder; default: {FOLDER}/<name>")
    args = parser.parse_args(arguments)
    if not MODEL.fullmatch(args.model):
        parser.error(f"{args.model!r} is not the name of a model on a hub, Qwen/Qwen3.5-4B")
    try:
        print(download(args.model, HUBS[args.source](), args.out or FOLDER / args.model.rpartition("/")[2]))
    except USER_ERRORS as error:
        return complain(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
