"""The virtual cluster: a process group of any size in one process, a fake device, a real host."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Tensors = list[Tensor]


class Observer(Protocol):
    def observe(self, func: Any, args: tuple, kwargs: dict, inputs: Tensors, outputs: Tensors) -> None:
        """An operator on the device was called; `inputs` are all tensors in its arguments."""


@contextmanager
def fake_process_group(world: int) -> Iterator[None]:
    """The default group, with this process as rank 0. Nothing is sent, and nothing blocks."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::_allgather_base_", "Meta"):
        import_module("torch.distributed._tools.fake_collectives")  # where an older torch registers them
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


class FakeDevice(TorchDispatchMode):
    """Runs operators that touch the device on fake tensors, those of the host for real.

    Observers see the former. On a CPU, where the host is the device, they see both.
    """

    def __init__(self, device: torch.device, observers: list[Observer]):
        super().__init__()
        self.device, self.observers = device, observers
        self.is_shared = device.type == "cpu"
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.unknown: dict[int, weakref.ref] = {}  # host storages whose values came from fake tensors
        # Storages of fake tensors that stand for a host storage and take no device memory. That one
        # lives as long as its double, of which a view may outlive the host's tensor.
        self.doubles: dict[int, tuple[weakref.ref, torch.UntypedStorage]] = {}

    def __enter__(self) -> "FakeDevice":
        # otherwise torch.tensor(…, device=) would copy to the device unseen by the modes
        self.lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.fake.__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self.lifted)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls the operator on its local tensors, which are dispatched here
        is_own = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is self.fake
        if not is_own or len(self.fake.enter_stack) > 1:
            # DTensor infers a shape: under its own fake mode, or on torch 2.10 under ours once more
            return func(*args, **kwargs)
        inputs = tensors_among((*args, *kwargs.values()))
        if inputs and kwargs.get("device") is None and all(_is_on_meta(x) for x in inputs):
            with unset_fake_temporarily():  # sharding of the model before it has a device: five times faster
                return func(*args, **kwargs)
        is_pinned = kwargs.get("pin_memory")  # receives copies from the device, whose values are unknown
        if func.namespace in ("aten", "prims") and not is_pinned and self._is_on_host(inputs, kwargs.get("device")):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            if not self.is_shared:
                return out
        else:
            if self.is_shared and func._schema.is_mutable:
                self._forget(func, args, kwargs)
            # host tensors become fake as well, or fake tensors would compute with their values
            if any(map(_is_real, inputs)):
                args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs))
            out = func(*args, **kwargs)
        outputs = tensors_among((out,))
        if func.namespace != "prim":  # prim: internal to fake tensors
            for observer in self.observers:
                observer.observe(func, args, kwargs, inputs, outputs)
        return out

    def _is_on_host(self, inputs: Tensors, device: Any) -> bool:
        is_host = device is None or torch.device(device).type == "cpu"
        return is_host and all(
            not isinstance(x, FakeTensor) and x.device.type == "cpu" and not _is_among(self.unknown, x) for x in inputs
        )

    def _forget(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Mark what the operator writes into as unknown."""
        given = [*zip(func._schema.arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        for argument, value in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in tensors_among((value,)):
                    if not isinstance(x, FakeTensor):
                        _remember(self.unknown, x)

    def _fake(self, x: Tensor) -> Tensor:
        if not _is_real(x):
            return x
        double = self.fake.from_tensor(x)
        storage = double.untyped_storage()
        address = storage._cdata
        if address not in self.doubles:
            alive = weakref.ref(storage, partial(_drop, self.doubles, address))
            self.doubles[address] = alive, x.untyped_storage()
        return double


def tensors_among(values: Iterable[Any]) -> Tensors:
    """Also those in lists, which is all that operators take and return. A pytree is much slower."""
    found: Tensors = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_among(value)
    return found


def _is_real(x: Tensor) -> bool:
    return not isinstance(x, FakeTensor) and x.device.type == "cpu"


def _is_on_meta(x: Tensor) -> bool:
    return not isinstance(x, FakeTensor) and x.is_meta  # a fake tensor's is_meta would be an operator


def _is_among(table: dict[int, weakref.ref], x: Tensor) -> bool:
    return bool(table) and x.untyped_storage()._cdata in table


def _remember(table: dict[int, weakref.ref], x: Tensor) -> None:
    """Add x's storage, for as long as it lives."""
    storage = x.untyped_storage()
    address = storage._cdata
    table[address] = weakref.ref(storage, partial(_drop, table, address))


def _drop(table: dict[int, Any], address: int, _: object) -> None:
    table.pop(address, None)
