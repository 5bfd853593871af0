"""Jobs done by several processes, their results in the order of the jobs, no more than a job a process in memory."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from qwen35.errors import UserError
from qwen35.processes import die_with

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(
    make: Callable[[], Callable[[Job], Result]], jobs: Iterable[Job], workers: int
) -> Generator[Result, None, None]:
    """`make()(job)` of each job; `make` runs once in every process. Fewer than two jobs or workers: in this one.

    Raises the UserError that `make` or a job raised, and one where a process ends before its time.
    """
    waiting = iter(jobs)
    first = list(islice(waiting, 2))
    if len(first) < 2 or workers < 2:
        work = make()
        for job in chain(first, waiting):
            yield work(job)
        return
    context = multiprocessing.get_context("fork")
    processes, ends = [], []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(make, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()  # so that its end is seen here
            processes.append(process)
            ends.append(ours)
        queue: list[Connection] = []  # of those at work, the oldest job's first
        for number, job in enumerate(chain(first, waiting)):
            end = ends[number % workers]
            if number >= workers:
                done: Result = _receive(queue.pop(0))
                _send(end, job)  # before the result is looked at: no process waits for that
                queue.append(end)
                yield done
            else:
                _send(end, job)
                queue.append(end)
        for end in queue:
            yield _receive(end)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _send(end: Connection, job: Any) -> None:
    with suppress(BrokenPipeError):  # it has ended, which receiving from it tells
        end.send(job)


def _receive(end: Connection) -> Any:
    try:
        result = end.recv()
    except (EOFError, ConnectionResetError):
        raise UserError(
            "a process ended before its work was done; was the memory full? --workers 1 needs the least"
        ) from None
    if isinstance(result, UserError):
        raise result
    return result


def _serve(make: Callable[[], Callable[[Job], Result]], end: Connection, parent: int) -> None:
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        work = make()
        while True:
            end.send(work(end.recv()))
    except UserError as error:
        end.send(error)
    except EOFError:
        pass
