"""What the first run of a layer hands to the second, where it is run again for backward (activation checkpointing)."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Kept:
    """Results that are not computed twice: which expert-parallel rank gets how many rows (asking again would be a host
    sync), and, with `outputs`, what attention and the delta rule return.

    One object a layer and micro-batch, given to torch.utils.checkpoint as `context_fn=kept.contexts`. The second run asks
    in the order of the first. Tensors must be given to `once` detached: they outlive the first run's graph. pack, unpack: how
    outputs are put away and found again; what pack gives must hold nothing of the graph either.
    """

    def __init__(
        self,
        outputs: bool = False,
        pack: Callable[[Tensor], Any] = Tensor.detach,
        unpack: Callable[[Any], Tensor] = Tensor.detach,
    ) -> None:
        self.outputs, self._pack, self._unpack = outputs, pack, unpack
        self._results: deque[Any] = deque()
        self.is_second = False

    def once(self, make: Callable[[], T]) -> T:
        """make(), or in the second run what it gave in the first."""
        if self.is_second:
            return self._results.popleft()
        result = make()
        self._results.append(result)
        return result

    def outputs_once(self, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The same of outputs, inside an autograd.Function's forward."""
        if self.is_second:
            return tuple(self._unpack(x) for x in self._results.popleft())
        result = make()
        self._results.append(tuple(self._pack(x) for x in result))
        return result

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Of the first run, of the second."""
        return nullcontext(), self._second()

    @contextmanager
    def _second(self) -> Iterator[None]:
        self.is_second = True
        yield
        self.is_second = False


def outputs_once(kept: Kept | None, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """make(), or what the first run made. None: there is only one run."""
    return make() if kept is None else kept.outputs_once(make)
