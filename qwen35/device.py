"""The only file that says npu, cuda or cpu, and hccl, nccl or gloo."""

import os
import re
import resource
import socket
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qwen35.errors import SettingError, one_line
from qwen35.network import LOOPBACK

HOST = torch.device("cpu")  # for what is read or kept by the host on every machine
CPU_ONLY_ENV = {
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "CUDA_VISIBLE_DEVICES": "",
}  # a process with these computes on the CPU
BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}  # what hides devices from a process
DETERMINISTIC_ENV = {"HCCL_DETERMINISTIC": ("true", "strict"), "CLOSE_MATMUL_K_SHIFT": ("1",)}  # by default the first of these


def device_type() -> str:
    """What this process computes on: an NPU if torch_npu is there and sees one, else a GPU, else the CPU."""
    if hasattr(torch, "npu") and torch.npu.is_available():
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device_count(kind: str, count: int) -> None:
    """Raises SettingError if the launcher started more processes here than this machine shows devices; a CPU has room."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if kind != "cpu" and processes > count:
        raise SettingError(
            f"{processes} processes on this machine, but {count} {kind} device{'s' * (count != 1)} visible "
            f"({VISIBLE[kind]}={os.environ.get(VISIBLE[kind], '')}); set NPUS_PER_NODE={count}, or show more of them"
        )


def device_count() -> int:
    """How many devices of its kind this process sees; the CPU is one."""
    kind = device_type()
    return 1 if kind == "cpu" else getattr(torch, kind).device_count()


def enable_determinism() -> None:
    """Have the same step give the same bits each time; to be called before the device is taken.

    torch's switch is all on a CPU, where an operator that has no such form is an error then. With it torch_npu sets
    ACL_OPT_DETERMINISTIC before each operator (SetDeterministicOption in its OpParamMaker.cpp), which these of a step ask for
    (GetDeterministic in the tiling of CANN's ops-nn and ops-transformer): the gradients of attention, norm, embedding and
    convolution, and the matmul. HCCL's sums and the matmul's order along K have a variable each.
    Raises SettingError for one that says otherwise.
    """
    for name, values in DETERMINISTIC_ENV.items():
        value = os.environ.setdefault(name, values[0])
        if value.lower() not in values:
            raise SettingError(
                f"{name}={value} contradicts training.deterministic: true, which needs {' or '.join(values)}; leave it unset"
            )
    filling = torch.utils.deterministic  # a launch for each new tensor, of which nothing is read
    filling.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)


def set_up_device() -> torch.device:
    """This rank's device, made ready to compute on. Raises SettingError."""
    kind, local_rank = device_type(), int(os.environ.get("LOCAL_RANK", "0"))
    check_device_count(kind, device_count())
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, local_rank)
    if kind != "cpu":
        getattr(torch, kind).set_device(device)
    if kind == "npu":
        npu = torch.npu  # type: ignore[attr-defined]  # torch_npu adds it
        npu.set_compile_mode(jit_compile=False)  # compiled operators would be compiled anew for every shape
        npu.config.allow_internal_format = False  # private layouts cost a copy at every op that lacks them
        npu.matmul.allow_hf32 = npu.conv.allow_hf32 = False  # fp32 means fp32
    return device


def init_process(timeout: float = 1800) -> torch.device:
    """Join the processes that the launcher started (or be alone) and take this rank's device. Raises SettingError.

    timeout: seconds that they wait here for each other, and later in a collective for the slowest.
    """
    kind, device = device_type(), set_up_device()
    store: dist.Store | None = None  # torch's own, by what the launcher has set
    rank = world = -1
    try:
        if "RANK" not in os.environ:  # without a launcher: one process, and no port
            store, rank, world = dist.HashStore(), 0, 1
        elif is_one_node():
            store, rank, world = loopback_store(timeout), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            BACKENDS[kind], timeout=timedelta(seconds=timeout), store=store, rank=rank, world_size=world
        )
    except (dist.DistError, OSError) as error:  # of the store, where the processes meet
        if is_lost(error):
            raise
        address = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        raise SettingError(f"{address}: the processes cannot meet there: {one_line(error)}") from None
    return device


def is_one_node() -> bool:
    """Whether all ranks are on this machine, and nobody has made a store for them already, as torchrun does."""
    world, here = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE")
    return here == world and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ


def loopback_store(timeout: float) -> dist.Store:
    """Where the processes of one machine meet: torch's own store, but out of reach of other machines. Raises OSError."""
    port, is_first = int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    listener = socket.create_server((LOOPBACK, port)).detach() if is_first else None
    world = int(os.environ["WORLD_SIZE"])
    return dist.TCPStore(
        LOOPBACK, port, world, is_master=is_first, timeout=timedelta(seconds=timeout), master_listen_fd=listener
    )


def host_group(timeout: float) -> dist.ProcessGroup:
    """All ranks, in a group of its own whose messages go from host to host. Raises SettingError.

    timeout: seconds that they wait for the slowest; torch would take half an hour, whatever the other groups have.
    """
    try:
        return dist.new_group(backend=BACKENDS["cpu"], timeout=timedelta(seconds=timeout))
    except RuntimeError as error:  # gloo's
        if is_lost(error):
            raise
        raise SettingError(
            f"the processes cannot meet over the network of their hosts: {one_line(error)}; GLOO_SOCKET_IFNAME names it"
        ) from None


def is_lost(error: Exception) -> bool:
    """Whether another process has ended while this one met it: its end is what went wrong, and no setting."""
    return re.search("[Bb]roken pipe|(reset|closed) by peer|likely closed|got 0 bytes", str(error)) is not None


def host_buffer(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Zeros on the host like a tensor, sharded as it is; page-locked if that is on a device, which then copies without the
    host's help."""
    is_locked = has_own_memory(tensor.device)
    return torch.zeros_like(tensor, dtype=dtype, device=HOST, pin_memory=is_locked, requires_grad=False)


def has_own_memory(device: torch.device) -> bool:
    """Whether it has a memory of its own, which takes what is page-locked on the host without the host's help.

    From memory that is not, a copy holds up the host until the device has got to it. torch_npu too keeps a page-locked block
    from being used anew before its copies are done (process_non_blocking_copy in its sources).
    """
    return device.type != "cpu"


class CopyQueue:
    """Copies between a device and the host, in order, beside what the device computes. On a CPU: at once, by the host.

    The caller keeps alive what is copied, until the device has been told to hold for it (or the host waited).
    """

    def __init__(self, device: torch.device):
        self._api: Any = None if device.type == "cpu" else getattr(torch, device.type)
        self._stream: Any = self._api.Stream(device) if self._api else None

    def wait_for_device(self) -> None:
        """What is queued from now on comes after all that the device has been asked to compute so far."""
        if self._stream:
            self._stream.wait_stream(self._api.current_stream())

    def behind(self, event: Any) -> AbstractContextManager[Any]:
        """Copies inside the block are queued here, behind a mark of another queue (None: behind nothing more)."""
        if not self._api:
            return nullcontext()
        if event:
            self._stream.wait_event(event)
        return self._api.stream(self._stream)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in page-locked memory, whole once what is queued so far is done."""
        room = torch.empty(tensor.shape, dtype=tensor.dtype, device=HOST, pin_memory=self._api is not None)
        with self.behind(None):
            return room.copy_(tensor, non_blocking=True)

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The way back; into memory that the device may use for nothing else meanwhile."""
        room = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        with self.behind(None):
            return room.copy_(tensor, non_blocking=True)

    def record_event(self) -> Any:
        """All that is queued here so far."""
        return self._stream.record_event() if self._stream else None

    def make_device_wait(self, event: Any) -> None:
        """What the device is asked to compute from now on comes after a mark; the host goes on."""
        if event:
            self._api.current_stream().wait_event(event)


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait until all that was asked of these is done; the host itself has nothing to wait for."""
    for device in devices:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: on the device, or of the whole process on a CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return getattr(torch, device.type).max_memory_allocated(device)


def make_profiler(device: torch.device, steps: int, memory: bool, folder: Path) -> Any:
    """The device's profiler, host included: start(), step() after each step, and after one to warm up and `steps` to record
    it has written a Chrome trace below `folder`, trace.json or torch_npu's trace_view.json. memory: allocations too.
    """
    kind: Any = torch.profiler
    if device.type == "npu":
        from kernels.npu import profiler as kind

        # by the wheel's signatures the same as torch's, but for who writes: it keeps its raw data beside what it makes of them
        ready = kind.tensorboard_trace_handler(str(folder), worker_name="rank")
    else:

        def ready(done: Any) -> None:
            done.export_chrome_trace(str(folder / "trace.json"))

    schedule = kind.schedule(wait=0, warmup=1, active=steps, repeat=1)
    return kind.profile(schedule=schedule, on_trace_ready=ready, profile_memory=memory)


def has_memory_history(device: torch.device) -> bool:
    return device.type != "cpu"


def record_memory(device: torch.device, on: bool) -> None:
    """Have an accelerator remember its allocations, with their stacks; or no longer."""
    getattr(torch, device.type).memory._record_memory_history(enabled="all" if on else None)


def save_memory(device: torch.device, path: Path) -> None:
    """What it remembers."""
    getattr(torch, device.type).memory._dump_snapshot(str(path))


def device_rng_state(device: torch.device) -> torch.Tensor | None:
    """The state of the device's own generator; the CPU's is the host's."""
    return None if device.type == "cpu" else getattr(torch, device.type).get_rng_state(device)


def set_device_rng_state(state: torch.Tensor, device: torch.device) -> None:
    getattr(torch, device.type).set_rng_state(state, device)


def model_name(device: torch.device) -> str:
    """Of what kind it is, "Ascend910B2"; a CPU is a CPU."""
    return "cpu" if device.type == "cpu" else str(getattr(torch, device.type).get_device_name(device))


def describe(device: torch.device) -> str:
    words = f"{torch.get_num_threads()} threads a process" if device.type == "cpu" else model_name(device)
    return f"{device.type} ({words})"
