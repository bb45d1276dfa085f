"""Cached FP8 quantizations of weights, valid until the weights change.

A weight that stays in memory is quantized once per optimizer step, not once per micro-batch.

Notable: torch counts the in-place changes of a tensor, except those by its fused optimizers. So the cache is also
invalidated after any step of any torch optimizer. Code that changes weights in another way must call `weights_changed`.
Where the weights themselves are in memory only while they are used, their owner says when the quantization is (`hold`,
`drop`).
"""

from collections.abc import Callable
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from moray.kernels.util.place import place


class Quantization(Protocol):
    """The tensors of a quantization, which can be freed and made again while others refer to the object."""

    def clear(self) -> None: ...
    def fill(self, other: Self) -> None: ...


Quantized = TypeVar("Quantized", bound=Quantization)

_changes = 0  # changes of weights in this process that torch does not count


class QuantizationCache(Generic[Quantized]):
    """Caches the result of `make` for some weights; recomputes it when one of them has changed."""

    def __init__(self, make: Callable[..., Quantized]) -> None:
        self._make = make
        self._kept: tuple[object, Quantized] | None = None
        self._held: Quantized | None = None

    def get(self, *weights: Tensor) -> Quantized:
        if self._held is not None:
            return self._held
        now = (_changes, *((place(weight), weight._version) for weight in weights))
        if self._kept is None or self._kept[0] != now:
            self._kept = None  # frees the old result first
            self._kept = (now, self._make(*weights))
        return self._kept[1]

    def hold(self, *weights: Tensor) -> None:
        """Quantizes now; `get` returns this result until the next `hold`, whatever happens to the weights."""
        if self._held is None:
            self._held = self._make(*weights)
            return
        self._held.clear()
        self._held.fill(self._make(*weights))

    def drop(self) -> None:
        """Frees the result of `hold`, until the next one."""
        if self._held is not None:
            self._held.clear()


def weights_changed(*_: Any) -> None:
    """Invalidates all caches in this process."""
    global _changes  # noqa: PLW0603
    _changes += 1


register_optimizer_step_post_hook(weights_changed)
