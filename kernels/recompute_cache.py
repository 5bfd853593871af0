"""The recompute cache: what a layer's first run hands to its second (activation checkpointing)."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class RecomputeCache:
    """Results that the second run of a layer reuses instead of computing them again.

    It holds the row counts of expert parallelism, which cost a host sync, and with `keeps_outputs`
    also the outputs of attention and the delta rule.

    Make one per layer and micro-batch and pass its `contexts` to torch.utils.checkpoint as
    `context_fn`. The second run must ask in the same order as the first. `once` takes detached
    tensors only, because they outlive the graph of the first run. `pack` and `unpack` store and
    restore outputs (activation offloading); what `pack` returns must not refer to the graph either.
    """

    def __init__(
        self,
        keeps_outputs: bool = False,
        ends_with_experts: bool = False,
        pack: Callable[[Tensor], Any] = Tensor.detach,
        unpack: Callable[[Any], Tensor] = Tensor.detach,
    ) -> None:
        """ends_with_experts: backward uses no value that depends on what the experts return."""
        self.keeps_outputs, self._pack, self._unpack = keeps_outputs, pack, unpack
        self.ends_with_experts = ends_with_experts
        self._results: deque[Any] = deque()
        self.is_recomputing = False

    def once(self, compute: Callable[[], T]) -> T:
        """compute() in the first run; the same result again in the second."""
        if self.is_recomputing:
            return self._results.popleft()
        result = compute()
        self._results.append(result)
        return result

    def outputs_once(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """As `once`, for the outputs computed inside an autograd.Function's forward."""
        if self.is_recomputing:
            return tuple(self._unpack(x) for x in self._results.popleft())
        result = compute()
        self._results.append(tuple(self._pack(x) for x in result))
        return result

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of the first and of the second run, for checkpoint's `context_fn`."""
        return nullcontext(), self._recomputing()

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        self.is_recomputing = True
        yield
        self.is_recomputing = False


def skips_experts_output(cache: RecomputeCache | None) -> bool:
    """Whether the layer runs a second time, only for what the experts' backward needs."""
    return cache is not None and cache.is_recomputing and cache.ends_with_experts


def outputs_once(cache: RecomputeCache | None, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """cache.outputs_once(compute), or just compute() if the layer runs only once (None)."""
    return compute() if cache is None else cache.outputs_once(compute)
