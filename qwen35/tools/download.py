"""Download a model: `python -m qwen35.tools.download Qwen/Qwen3.5-4B [--source S] [--out FOLDER]`.

Files are downloaded into a hidden folder beside the model's, and renamed to it when all are there
and checked: a folder with the model's name is complete. The same command resumes a stopped
download.
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
THREADS = 8  # files that are downloaded at the same time
TRIES = 6  # in a row without a byte
PAUSE = 1.0  # seconds after the first failure, doubled after each further one
CHUNK_BYTES = 2**20
MIN_FREE = 2**28  # bytes to leave free on the disk

Progress = Callable[[int], object]  # called with the bytes of each chunk


class _StoppedError(Exception):
    """Another file's download has failed, or the user has interrupted."""


def download(model: str, hub: Hub, folder: Path) -> str:
    """Download a model into `folder`, or compare an existing one with the hub's.

    Returns a line for the user. Raises UserError, OSError.
    """
    try:
        files = hub.files(model)
    except UnreachableError as error:
        if folder.exists():
            raise UnreachableError(f"{error}; {folder} exists, but was not compared with the hub") from None
        raise UnreachableError(
            f"{error}; copy {model}'s config, tokenizer, processor and safetensors into {folder} by hand, or try"
            " SOURCE=modelscope or HF_ENDPOINT=<a mirror>"
        ) from None
    total = sum(file.size for file in files)
    summary, checked = f"{len(files)} files, {total:,} bytes", f"all as on {hub.host}"
    if unchecked := sum(file.checksum is None for file in files):
        checked += f", but {unchecked} without a checksum there are compared by size alone"
    if folder.is_symlink():  # os.rename cannot replace a link by a folder
        folder = Path(os.path.realpath(folder))
    beside = folder.with_name(f".{folder.name}.download")
    is_there = f"{folder} exists already: {summary}, {checked}"
    if _is_there(folder):
        _compare(files, folder, beside)
        return is_there
    with holding(beside) as warning:
        if _is_there(folder):  # another job has downloaded it while this one waited
            _compare(files, folder, beside)
            return is_there
        present = sum(_size(beside / file.name) for file in files)
        lines = [
            f"{model} from {hub.host} to {folder}: {summary}",
            f"{present:,} bytes were downloaded before" if present else "",
            warning,
        ]
        print(*filter(None, lines), sep="\n", flush=True)
        _check_disk(beside, total - present)
        _remove_others(files, beside)
        with _bar(total, folder.name) as progress:
            fetch = partial(_fetch_all, hub, beside, progress)
            fetch([file for file in files if file.name == CONFIG])
            try:
                load_config(beside)  # stop early if the model cannot be trained here
            except ConfigError:
                (beside / CONFIG).unlink(missing_ok=True)
                raise
            fetch([file for file in files if file.name != CONFIG])
        HFFolder(beside)  # raises if a file that the index names is missing
        for file in files:
            flush(beside / file.name)
        (beside / LOCK).unlink()
        beside.rename(folder)
        flush(folder.parent)
    return f"{folder}: {summary}, {checked}"


def _is_there(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _compare(files: Sequence[HubFile], folder: Path, beside: Path) -> None:
    """Raises DownloadError if a file of the hub is missing in the folder, or differs."""
    same_size = [file for file in files if _size(folder / file.name) == file.size]
    wrong = [
        f"{file.name} is {_size(folder / file.name)} bytes of {file.size}" for file in files if file not in same_size
    ]
    with (
        _bar(sum(file.size for file in same_size), f"comparing {folder.name}") as progress,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for file, hasher in zip(
            same_size, pool.map(lambda f: _hashed(folder / f.name, f, progress), same_size), strict=True
        ):
            if not _fits(file, hasher):
                wrong.append(f"{file.name} differs")
    if wrong:
        few = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise DownloadError(
            f"{folder} exists, but differs from the hub: {few}; move it away, or to {beside}, to keep what is right"
        )


def _check_disk(folder: Path, needed: int) -> None:
    free = disk_usage(folder).free
    if needed and needed + MIN_FREE > free:
        raise DownloadError(f"{folder.parent}: {needed:,} bytes are missing, and {free:,} are free on that disk")


def _remove_others(files: Sequence[HubFile], folder: Path) -> None:
    """Remove files of an earlier revision of the model."""
    names = {LOCK, *(file.name for file in files)}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink()


@contextmanager
def _bar(total: int, title: str) -> Iterator[Progress]:
    """A progress bar on a terminal. Yields its update function, which any thread may call."""
    lock, hidden = threading.Lock(), not sys.stderr.isatty()
    with tqdm(
        total=total, desc=title, unit="B", unit_scale=True, unit_divisor=1024, disable=hidden, leave=False
    ) as bar:

        def update(count: int) -> None:
            with lock:
                bar.update(count)

        yield update


# -- one file --------------------------------------------------------------------------------------


def _fetch_all(hub: Hub, folder: Path, progress: Progress, files: Sequence[HubFile]) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(_fetch, hub, file, folder / file.name, progress, stop) for file in files]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:  # KeyboardInterrupt too
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(hub: Hub, file: HubFile, path: Path, progress: Progress, stop: threading.Event) -> None:
    """Complete what an earlier run left in `path`; if its checksum is wrong, start anew.

    Raises DownloadError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if _size(path) > file.size or file.checksum is None:
        path.unlink(missing_ok=True)  # without a checksum it may be of an older revision
    for present in (_size(path), 0):
        hasher = _hashed(path, file, progress)
        _append(hub, file, path, hasher, progress, stop)
        if _fits(file, hasher):
            return
        path.unlink()
        progress(-file.size)
        if not present:
            break
    raise DownloadError(
        f"{file.name}: what {hub.host} sent does not have its checksum, and was removed; try again, or another SOURCE"
    )


def _append(hub: Hub, file: HubFile, path: Path, hasher: Any, progress: Progress, stop: threading.Event) -> None:
    """Raises UnreachableError after TRIES without a byte, OSError of the disk."""
    failures = 0
    with naming(path), path.open("ab") as out:
        while (have := out.tell()) < file.size:
            chunks = _chunks(hub, file, have)
            while not stop.is_set():
                try:
                    chunk = next(chunks, None)
                except (OSError, HTTPException) as error:
                    failures += 1
                    if failures == TRIES:
                        raise UnreachableError(
                            f"{hub.host} sends no more of {file.name}, after {out.tell():,} of {file.size:,} bytes:"
                            f" {one_line(error)}; the same command goes on from there"
                        ) from None
                    stop.wait(PAUSE * 2 ** (failures - 1))
                    break
                if chunk is None:
                    break
                out.write(chunk)
                out.flush()
                hasher.update(chunk)
                progress(len(chunk))
                failures = 0
            if stop.is_set():
                raise _StoppedError


def _chunks(hub: Hub, file: HubFile, start: int) -> Iterator[bytes]:
    """The bytes of a file from `start` to its end. Raises OSError, HTTPException, DownloadError."""
    with hub.open(file.url, start) as answer:
        remaining, skip = file.size - start, 0
        if start and answer.status != 206:
            skip = start  # it ignores the range and sends the whole file
        elif start and not (answer.headers["Content-Range"] or "").startswith(f"bytes {start}-"):
            raise OSError("it sends another part of the file than requested")
        while remaining:
            chunk = answer.read1(min(CHUNK_BYTES, skip or remaining))  # what has arrived, without waiting for more
            if not chunk:
                raise OSError("the connection ended early")
            if skip:
                skip -= len(chunk)
            else:
                remaining -= len(chunk)
                yield chunk


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _hashed(path: Path, file: HubFile, progress: Progress) -> Any:
    """The hash of what is on the disk of a file."""
    hasher = file.hasher()
    if path.is_file():
        with path.open("rb") as content:
            while chunk := content.read(CHUNK_BYTES):
                hasher.update(chunk)
                progress(len(chunk))
    return hasher


def _fits(file: HubFile, hasher: Any) -> bool:
    return file.checksum is None or hasher.hexdigest() == file.checksum[1]


# -- the command -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m qwen35.tools.download", description=__doc__)
    add = parser.add_argument
    add("model", help="its name on the hub, e.g. Qwen/Qwen3.5-4B")
    add("--source", choices=HUBS, default="hf", help="the hub; default: hf")
    add("--out", type=Path, help=f"folder; default: {FOLDER}/<name>")
    args = parser.parse_args(arguments)
    if not MODEL.fullmatch(args.model):
        parser.error(f"{args.model!r} is not the name of a model on a hub, such as Qwen/Qwen3.5-4B")
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
