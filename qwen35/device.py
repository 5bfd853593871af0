"""All that depends on the device: the only file that names npu, cuda, cpu, hccl, nccl or gloo."""

import ctypes
import os
import re
import resource
import socket
from collections.abc import Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from qwen35.errors import SettingError, one_line
from qwen35.network import LOOPBACK, STORE_LISTENER

HOST = torch.device("cpu")
TABLE_ROWS = 100  # operators in the table of a profile
CPU_ONLY_ENV = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "CUDA_VISIBLE_DEVICES": ""}  # hides all accelerators
BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
VISIBLE_DEVICES_ENV = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
DETERMINISTIC_ENV = {"HCCL_DETERMINISTIC": ("true", "strict"), "CLOSE_MATMUL_K_SHIFT": ("1",)}  # name -> valid values


class WithoutInit(TorchFunctionMode):
    """For torch.device("meta"): there, torch.nn.init takes a second to import torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") != "torch.nn.init":
            return func(*args, **kwargs or {})
        return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]


def device_type() -> str:
    """The device type of this process: an NPU if torch_npu sees one, else a GPU, else the CPU."""
    if hasattr(torch, "npu") and torch.npu.is_available():
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device_count(kind: str, count: int) -> None:
    """Raises SettingError if there are more processes on this node than visible accelerators."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if kind != "cpu" and processes > count:
        raise SettingError(
            f"{processes} processes on this node, but {count} {kind} device{'s' * (count != 1)} visible "
            f"({VISIBLE_DEVICES_ENV[kind]}={os.environ.get(VISIBLE_DEVICES_ENV[kind], '')}); set NPUS_PER_NODE={count},"
            " or make more devices visible"
        )


def device_count() -> int:
    """The number of visible devices of this process's type; 1 for the CPU."""
    kind = device_type()
    return 1 if kind == "cpu" else getattr(torch, kind).device_count()


def enable_determinism() -> None:
    """Make a step bit-reproducible. To be called before set_up_device.

    On a CPU torch's switch suffices; operators without a deterministic form then raise an error. On
    an NPU it makes torch_npu set ACL_OPT_DETERMINISTIC before each operator (SetDeterministicOption
    in OpParamMaker.cpp). Of a step's operators these read it (GetDeterministic in the tiling of
    CANN's ops-nn and ops-transformer): the gradients of attention, norm, embedding and convolution,
    and matmul. HCCL's sums and matmul's order along K each need an environment variable.
    Raises SettingError if such a variable is set to another value.
    """
    for name, values in DETERMINISTIC_ENV.items():
        value = os.environ.setdefault(name, values[0])
        if value.lower() not in values:
            raise SettingError(
                f"{name}={value} contradicts training.deterministic: true, which needs {' or '.join(values)}; leave it unset"
            )
    # filling would cost a kernel launch per new tensor, and no code reads uninitialized memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)


def set_up_device() -> torch.device:
    """Select and configure this rank's device. Raises SettingError."""
    kind, local_rank = device_type(), int(os.environ.get("LOCAL_RANK", "0"))
    check_device_count(kind, device_count())
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, local_rank)
    if kind != "cpu":
        getattr(torch, kind).set_device(device)
    if kind == "npu":
        npu = torch.npu  # type: ignore[attr-defined]  # torch_npu adds it
        npu.set_compile_mode(jit_compile=False)  # True compiles operators again for every shape
        npu.config.allow_internal_format = False  # operators that lack private formats would need copies
        npu.matmul.allow_hf32 = npu.conv.allow_hf32 = False  # fp32 means fp32
    return device


def end_process_group() -> None:
    """End the device's communicators. Those of the hosts end with the process (see `immortal`)."""
    if dist.is_initialized() and dist.get_backend() != BACKENDS["cpu"]:
        dist.destroy_process_group()


def immortal(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group that Python never frees.

    The destructor of torch 2.7's waits for the group's threads and keeps the GIL meanwhile, which
    one of them may still need to free the tensors of the last collective: then both wait forever.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    return group


def init_process(timeout: float = 1800) -> torch.device:
    """Initialise the process group (of one process without a launcher) and the device.

    timeout: seconds for ranks to join, and for collectives. Raises SettingError.
    """
    kind, device = device_type(), set_up_device()
    store: dist.Store | None = None  # None: from the launcher's environment variables
    rank = world = -1
    try:
        if "RANK" not in os.environ:  # without a launcher: one process, which needs no port
            store, rank, world = dist.HashStore(), 0, 1
        elif is_one_node():
            store, rank, world = loopback_store(timeout), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            BACKENDS[kind], timeout=timedelta(seconds=timeout), store=store, rank=rank, world_size=world
        )
    except (dist.DistError, OSError) as error:  # from the store
        if is_peer_failure(error):
            raise
        address = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        raise SettingError(f"{address}: the ranks cannot join the store at this address: {one_line(error)}") from None
    return device


def is_one_node() -> bool:
    """Whether all ranks are on this node and no launcher provides a store, as torchrun does."""
    world, here = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE")
    return here == world and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ


def loopback_store(timeout: float) -> dist.Store:
    """A TCPStore for the ranks of one node, which other machines cannot reach. Raises OSError."""
    port, is_first = int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    listener = None
    if is_first:  # the launcher's socket, if there is one, was bound before anybody else could take the port
        given = os.environ.pop(STORE_LISTENER, None)
        listener = int(given) if given else socket.create_server((LOOPBACK, port)).detach()
        os.set_inheritable(listener, False)
    return dist.TCPStore(
        LOOPBACK,
        port,
        int(os.environ["WORLD_SIZE"]),
        is_master=is_first,
        timeout=timedelta(seconds=timeout),
        master_listen_fd=listener,
        use_libuv=False,  # which in torch 2.7 takes no socket that is bound already
    )


def host_group(timeout: float) -> dist.ProcessGroup:
    """A process group of all ranks over the hosts' network (gloo). Raises SettingError.

    timeout: of its collectives, in seconds; torch's default is half an hour.
    """
    try:
        return immortal(dist.new_group(backend=BACKENDS["cpu"], timeout=timedelta(seconds=timeout)))
    except RuntimeError as error:  # gloo's
        if is_peer_failure(error):
            raise
        raise SettingError(
            f"the ranks cannot connect over the network of their hosts: {one_line(error)}; set GLOO_SOCKET_IFNAME"
        ) from None


def is_peer_failure(error: Exception) -> bool:
    """Whether another rank died while this one connected to it, so that no setting is to blame."""
    return re.search("[Bb]roken pipe|(reset|closed) by peer|likely closed|got 0 bytes", str(error)) is not None


def host_buffer(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Zeros on the host, shaped and sharded like `tensor`; page-locked for accelerators."""
    is_locked = has_own_memory(tensor.device)
    return torch.zeros_like(tensor, dtype=dtype, device=HOST, pin_memory=is_locked, requires_grad=False)


def has_own_memory(device: torch.device) -> bool:
    """Whether the device has memory of its own, to which page-locked host memory is copied by DMA.

    Its allocations can be recorded. A copy from pageable memory blocks the host. torch_npu does not
    reuse a page-locked block before its copies are done (process_non_blocking_copy in its sources).
    """
    return device.type != "cpu"


class CopyQueue:
    """A stream of copies between a device and the host. On a CPU every copy is immediate.

    The caller must keep the tensors alive until the device waits for the copies, or the host does.
    """

    def __init__(self, device: torch.device):
        self._api: Any = torch.get_device_module(device)
        self._stream: Any = self._api.Stream(device)

    def wait_for_device(self) -> None:
        """Queue further copies after all that has been launched on the device so far."""
        self._stream.wait_stream(self._api.current_stream())

    def behind(self, event: Any) -> AbstractContextManager[Any]:
        """A context whose copies are queued here, after another queue's event unless it is None."""
        if event:
            self._stream.wait_event(event)
        return self._api.stream(self._stream)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in page-locked memory, complete once the queue is done."""
        is_locked = has_own_memory(tensor.device)
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=HOST, pin_memory=is_locked)
        with self.behind(None):
            return copy.copy_(tensor, non_blocking=True)

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The way back, into new memory of the device."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        with self.behind(None):
            return copy.copy_(tensor, non_blocking=True)

    def record_event(self) -> Any:
        """An event after all that is queued here so far; None on a CPU."""
        return self._stream.record_event()

    def make_device_wait(self, event: Any) -> None:
        """Make the device, not the host, wait for an event before it computes anything else."""
        if event:
            self._api.current_stream().wait_event(event)


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait until these devices have finished; a CPU has nothing to wait for."""
    for device in devices:
        torch.get_device_module(device).synchronize(device)


def peak_memory(device: torch.device) -> int:
    """The peak number of bytes allocated on the device, or resident in the process on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device).max_memory_allocated(device)


def make_profiler(device: torch.device, steps: int, memory: bool, folder: Path) -> Any:
    """A profiler for device and host. Call start(), then step() after each step.

    After one step to warm up and `steps` recorded ones it writes a Chrome trace below `folder`, and
    what the operators took: trace.json and operators.txt, or torch_npu's trace_view.json and
    op_statistic.csv. memory: whether to record allocations.
    """
    profiler: Any = torch.profiler
    if device.type == "npu":
        from kernels.npu import profiler

        # torch_npu's own handler writes the trace beside its raw data; the rest is as in torch
        write_trace = profiler.tensorboard_trace_handler(str(folder), worker_name="rank")
    else:

        def write_trace(trace: Any) -> None:
            trace.export_chrome_trace(str(folder / "trace.json"))
            table = trace.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=TABLE_ROWS)
            (folder / "operators.txt").write_text(table, encoding="utf-8")

    schedule = profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
    return profiler.profile(schedule=schedule, on_trace_ready=write_trace, profile_memory=memory)


def record_memory(device: torch.device, on: bool) -> None:
    """Start or stop recording an accelerator's allocations with their stacks."""
    torch.get_device_module(device).memory._record_memory_history(enabled="all" if on else None)


def save_memory(device: torch.device, path: Path) -> None:
    """Write the recorded allocations as a snapshot file."""
    torch.get_device_module(device).memory._dump_snapshot(str(path))


def device_rng_state(device: torch.device) -> torch.Tensor | None:
    """The state of the accelerator's generator; None on a CPU, whose generator is the host's."""
    return None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_device_rng_state(state: torch.Tensor, device: torch.device) -> None:
    torch.get_device_module(device).set_rng_state(state, device)


def model_name(device: torch.device) -> str:
    """The product name, for example "Ascend910B2"; "cpu" for a CPU."""
    return "cpu" if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))


def describe(device: torch.device) -> str:
    details = f"{torch.get_num_threads()} threads a process" if device.type == "cpu" else model_name(device)
    return f"{device.type} ({details})"
