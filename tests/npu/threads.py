"""Ranks as threads of one process, with the process group that torch's tests use for that."""

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded


def run(ranks: int, work: Callable[[], None]) -> None:
    """Run work() once per rank, with a default group. Raises the first exception of any rank."""
    raised: list[BaseException] = []
    store, isolate = dist.HashStore(), torch._C._distributed_c10d._set_thread_isolation_mode

    def rank(number: int) -> None:
        dist.init_process_group("threaded", rank=number, world_size=ranks, store=store)
        try:
            work()
        except BaseException as error:  # the other ranks wait in a collective
            raised.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    isolate(True)
    threaded._install_threaded_pg()
    try:
        threads = [threading.Thread(target=rank, args=(number,)) for number in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threaded.ProcessLocalGroup.reset()  # else a rank that raised ends the ranks of the next call
        threaded._uninstall_threaded_pg()
        isolate(False)
    if raised:
        raise raised[0]
