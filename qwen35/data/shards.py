"""The work on one cache entry, divided among the machines that have the same cache_dir.

A file's records are tokenised in shards. A machine claims a shard by a small file, tokenises it and
writes it whole or not at all; who finds all shards there joins them to the entry, and removes them.
Claims only save work: a shard that two machines make has the same bytes, and the first one stays.
"""

import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

from qwen35.data.samples import Collected, FileSamples, read_samples, unwritable, write_samples

HOST = socket.gethostname()
# Seconds without a sign of life, after which a claim is void. A network file system may show a
# file's time a minute late.
CLAIM_TIMEOUT = 150.0


class Shards:
    """Of one cache entry. One process of a machine uses them at a time, as it holds the lock."""

    def __init__(self, entry: Path):
        self.entry, self.folder = entry, entry.with_suffix(".shards")
        self.count = 0  # of those that the file has, once all of it is read
        self._seen: dict[int, tuple[int, float]] = {}  # shard -> its claim's time, and since when it is that
        self._mine: set[int] = set()  # claimed, and not yet written
        self._touched = 0.0

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:06}.safetensors"

    def _claim(self, shard: int) -> Path:
        return self.folder / f"{shard:06}.claim"

    def claim(self, shard: int) -> bool:
        """Whether this process is to tokenise a shard; called for all, in order. SettingError."""
        self.count = shard + 1
        if self.path(shard).is_file() or self.entry.is_file():
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from None
        for mode in ("x", "w"):  # of two machines one makes the file; a dead one's is written over
            try:
                with self._claim(shard).open(mode) as file:
                    file.write(HOST)
            except FileExistsError:
                if not self.is_free(shard):
                    return False
            except FileNotFoundError:  # all is done, and another machine has removed the folder
                return False
            except OSError as error:
                raise unwritable(self.folder, error) from None
            else:
                break
        self._mine.add(shard)
        return True

    def is_free(self, shard: int) -> bool:
        """Whether nobody has claimed a shard, or only somebody who is dead."""
        try:
            time_of_claim, owner = self._claim(shard).stat().st_mtime_ns, self._claim(shard).read_text()
        except OSError:
            return True
        if owner == HOST:  # of a process that has ended, since this one has the lock
            return True
        now = time.monotonic()
        if self._seen.get(shard, (0, 0))[0] != time_of_claim:
            self._seen[shard] = time_of_claim, now
        return now - self._seen[shard][1] > CLAIM_TIMEOUT

    def keep(self) -> None:
        """Show the other machines that this one is alive, at most once a second."""
        if (now := time.monotonic()) - self._touched > 1:
            self._touched = now
            for shard in self._mine:
                with suppress(OSError):  # one has removed it, since it has all shards
                    os.utime(self._claim(shard))

    def write(self, shard: int, samples: FileSamples) -> None:
        """Raises SettingError."""
        write_samples(samples, self.path(shard))
        self._mine.discard(shard)
        if self.entry.is_file():  # another machine did not wait for this one
            self.remove()

    def missing(self) -> list[int]:
        return [shard for shard in range(self.count) if not self.path(shard).is_file()]

    def joined(self, made: Collected) -> bool:
        """Add all shards to `made`; False if one is damaged, or another machine has removed it."""
        for shard in range(self.count):
            samples = read_samples(self.path(shard), is_mapped=False)
            if samples is None:
                return False
            made.extend(Collected.of(samples))
        return True

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
