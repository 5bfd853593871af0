"""Work shared among a few threads: reading, writing and checksums all release the GIL."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# At least two, so that one computes while another waits for the disk. Each holds a few pieces
# (PIECE_BYTES) at a time.
THREADS = max(2, min(8, len(os.sched_getaffinity(0))))


def share_out(
    items: Iterable[Item], work: Callable[[int, Iterator[Item]], Result], threads: int = THREADS
) -> list[Result]:
    """Call work(thread number, items) in several threads; a free thread takes the next item.

    Returns each thread's result. After an error or an interrupt no thread takes another item, and
    it is raised.
    """
    left = deque(items)

    def next_items() -> Iterator[Item]:
        while True:
            try:
                yield left.popleft()
            except IndexError:
                return

    def guarded(number: int) -> Result:
        try:
            return work(number, next_items())
        except BaseException:
            left.clear()
            raise

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(guarded, number) for number in range(threads)]
        try:
            return [future.result() for future in running]
        except BaseException:
            left.clear()
            raise
