"""Download a model: `python -m qwen35.tools.download Qwen/Qwen3.5-4B [--source S] [--out FOLDER]`.

Files are downloaded into a hidden folder beside the model's, and renamed to it when all are there
and checked: a folder with the model's name is complete. The same command resumes a stopped
download.
"""

import os
import re
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from shutil import disk_usage

from tqdm import tqdm

from qwen35.checkpoint.folders import flush
from qwen35.checkpoint.hf_read import HFFolder
from qwen35.checkpoint.lock import LOCK, holding
from qwen35.errors import USER_ERRORS, Parser, complain, naming
from qwen35.model.config import ConfigError, load_config
from qwen35.tools.hub import HUBS, DownloadError, Hub, HubFile, UnreachableError, size_of

FOLDER, CONFIG = Path("ckpt/hf_path"), "config.json"
MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
PUBLISHED = re.compile(r"Qwen3\.[568]-[\w.-]*")  # a name alone that is one of the owner Qwen, on both hubs
THREADS = 8  # files that are downloaded at the same time
TRIES = 6  # in a row without a byte
PAUSE = 1.0  # seconds after the first failure, doubled after each further one
MIN_FREE = 2**28  # bytes to leave free on the disk


def download(model: str, hub: Hub, folder: Path, revision: str | None = None) -> str:
    """Download a model into `folder`, or compare an existing one with the hub's.

    Returns a line for the user. Raises UserError, OSError.
    """
    try:
        revision, files = hub.files(model, revision)
    except UnreachableError as error:
        if folder.exists():
            raise UnreachableError(f"{error}; {folder} exists, but was not compared with the hub") from None
        raise UnreachableError(
            f"{error}; copy {model}'s config, tokenizer, processor and safetensors into {folder} by hand, or try"
            " SOURCE=modelscope or HF_ENDPOINT=<a mirror>"
        ) from None
    total = sum(file.size for file in files)
    summary, checked = f"{len(files)} files, {total:,} bytes", f"all as in revision {revision} on {hub.host}"
    if unchecked := sum(not (file.sha256 or file.git) for file in files):
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
        present = sum(size_of(beside / file.name) for file in files)
        before = f", of which {present:,} were downloaded before" if present else ""
        print(f"{model}, revision {revision}, from {hub.host} to {folder}: {summary}{before}", flush=True)
        if warning:
            print(warning, flush=True)
        free = disk_usage(beside).free
        if total > present and total - present + MIN_FREE > free:
            raise DownloadError(
                f"{beside.parent}: {total - present:,} bytes are missing, and {free:,} are free on that disk"
            )
        for path in sorted(beside.rglob("*")):  # files of an earlier revision
            if path.is_file() and path.relative_to(beside).as_posix() not in {LOCK, *(file.name for file in files)}:
                path.unlink()
        with _bar(total, folder.name) as bar:
            bar.update(present)
            _fetch_all(hub, beside, bar, [file for file in files if file.name == CONFIG])
            try:
                load_config(beside)  # stop early if the model cannot be trained here
            except ConfigError:
                (beside / CONFIG).unlink(missing_ok=True)
                raise
            _fetch_all(hub, beside, bar, [file for file in files if file.name != CONFIG])
        HFFolder(beside)  # raises if a file that the index names is missing
        for file in files:
            flush(beside / file.name)
        (beside / LOCK).unlink()
        beside.rename(folder)
        flush(folder.parent)
    return f"{folder}: {summary}, {checked}"


def _bar(total: int, title: str) -> tqdm:
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None, leave=False)  # on a terminal alone


def _is_there(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _compare(files: Sequence[HubFile], folder: Path, beside: Path) -> None:
    """Raises DownloadError if a file of the hub is missing in the folder, or differs."""
    wrong = []
    total = sum(file.size for file in files)
    with _bar(total, f"comparing {folder.name}") as bar, ThreadPoolExecutor(THREADS) as pool:
        for file, same in zip(files, pool.map(lambda file: file.is_same(folder / file.name), files), strict=True):
            bar.update(file.size)
            if not same:
                size = size_of(folder / file.name)
                wrong.append(f"{file.name} " + ("differs" if size == file.size else f"is {size} bytes of {file.size}"))
    if wrong:
        few = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise DownloadError(
            f"{folder} exists, but differs from the hub: {few}; move it away, or to {beside}, to keep what is right"
        )


def _fetch_all(hub: Hub, folder: Path, bar: tqdm, files: Sequence[HubFile]) -> None:
    stop = threading.Event()  # another file's download has failed, or the user has interrupted
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for job in as_completed([pool.submit(_fetch, hub, file, folder / file.name, bar, stop) for file in files]):
                job.result()
        except BaseException:  # KeyboardInterrupt too
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(hub: Hub, file: HubFile, path: Path, bar: tqdm, stop: threading.Event) -> None:
    """Complete what an earlier run left in `path`; if its checksum is wrong, start anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if size_of(path) > file.size or not (file.sha256 or file.git):
        path.unlink(missing_ok=True)  # without a checksum it may be of an older revision
    for was_begun in (size_of(path) > 0, False):
        _append(hub, file, path, bar, stop)
        if stop.is_set() or file.is_same(path):
            return
        path.unlink()
        if not was_begun:
            break
    raise DownloadError(
        f"{file.name}: what {hub.host} sent does not have its checksum, and was removed; try again, or another SOURCE"
    )


def _append(hub: Hub, file: HubFile, path: Path, bar: tqdm, stop: threading.Event) -> None:
    """Download the rest of a file. Raises UnreachableError after TRIES without a byte."""
    failures = 0
    with naming(path), path.open("ab") as out:
        while (start := out.tell()) < file.size and not stop.is_set():
            try:
                with hub.get(file.url, start) as answer:
                    if answer.status_code != 206:  # perhaps it ignores the range and sends the whole file
                        out.seek(0)
                        out.truncate()
                    for chunk in answer.iter_bytes():
                        out.write(chunk)
                        out.flush()
                        failures = 0
                        with bar.get_lock():
                            bar.update(len(chunk))
                        if stop.is_set() or out.tell() > file.size:
                            return  # the checksum refuses a longer one
                    if out.tell() < file.size:
                        raise UnreachableError(f"{hub.host} ends too early")
            except UnreachableError as error:
                failures += 1
                if failures == TRIES:
                    raise UnreachableError(
                        f"{error}; there is no more of {file.name}, after {out.tell():,} of {file.size:,} bytes; the"
                        " same command goes on from there"
                    ) from None
                stop.wait(PAUSE * 2 ** (failures - 1))


# -- the command -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m qwen35.tools.download", description=__doc__)
    add = parser.add_argument
    add("model", help="its name on the hub, e.g. Qwen/Qwen3.5-4B; Qwen3.5, 3.6 and 3.8 do without the owner")
    add("--source", choices=HUBS, default="hf", help="the hub; default: hf")
    add("--revision", help="branch, tag or commit; default: the newest")
    add("--out", type=Path, help=f"folder; default: {FOLDER}/<name>")
    args = parser.parse_args(arguments)
    if PUBLISHED.fullmatch(args.model):
        args.model = f"Qwen/{args.model}"
    if not MODEL.fullmatch(args.model):
        parser.error(f"{args.model!r} is not the name of a model on a hub, such as Qwen/Qwen3.5-4B")
    out = args.out or FOLDER / args.model.rpartition("/")[2]
    try:
        print(download(args.model, HUBS[args.source](), out, args.revision))
    except USER_ERRORS as error:
        return complain(error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
