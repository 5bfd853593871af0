"""Runs jobs in several processes, yields the results in order, with one job each in memory."""

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
    """`make()(job)` for each job; `make` runs once in every process.

    With fewer than two jobs or workers all runs in this process. Raises the UserError that `make`
    or a job raised, or one that says that a process died.
    """
    remaining = iter(jobs)
    first = list(islice(remaining, 2))
    if len(first) < 2 or workers < 2:
        work = make()
        for job in chain(first, remaining):
            yield work(job)
        return
    context = multiprocessing.get_context("fork")
    processes, ends = [], []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(make, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()  # or the death of the process would not close the pipe
            processes.append(process)
            ends.append(ours)
        queue: list[Connection] = []  # to the busy processes, oldest job first
        for number, job in enumerate(chain(first, remaining)):
            end = ends[number % workers]
            if number >= workers:
                result: Result = _receive(queue.pop(0))
                _send(end, job)  # before yielding, so that the process does not idle meanwhile
                queue.append(end)
                yield result
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
    with suppress(BrokenPipeError):  # the process has died; _receive reports it
        end.send(job)


def _receive(end: Connection) -> Any:
    try:
        result = end.recv()
    except (EOFError, ConnectionResetError):
        raise UserError(
            "a worker process died before its work was done; if memory ran out, use fewer: --workers 1 needs the least"
        ) from None
    if isinstance(result, UserError):
        raise result
    return result


def _serve(make: Callable[[], Callable[[Job], Result]], end: Connection, parent: int) -> None:
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent terminates this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        work = make()
        while True:
            end.send(work(end.recv()))
    except UserError as error:
        end.send(error)
    except EOFError:
        pass
