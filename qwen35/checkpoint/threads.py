"""Work shared out to a few threads: reading, writing and checksums all leave Python's lock alone."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# two at least, so that one waits for the disk while another works; each holds a few pieces (slices.PIECE) at a time
THREADS = max(2, min(8, len(os.sched_getaffinity(0))))


def share_out(
    items: Iterable[Item], work: Callable[[int, Iterator[Item]], Result], threads: int = THREADS
) -> list[Result]:
    """Call work(number, its items) in several threads at once; each takes the next item, in order, when it is free.

    Returns what each gave. The first error, or an interrupt, keeps all from taking another item and is raised.
    """
    left = deque(items)

    def own() -> Iterator[Item]:
        while True:
            try:
                yield left.popleft()
            except IndexError:
                return

    def guarded(number: int) -> Result:
        try:
            return work(number, own())
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
