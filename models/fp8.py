"""Cached FP8 quantizations of weights, valid until the weights change.

A weight is quantized once per optimizer step, not once per micro-batch.

Notable: torch counts the in-place changes of a tensor, except those by its fused optimizers. So the cache is also
invalidated after any step of any torch optimizer. Code that changes weights in another way must call `weights_changed`.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from moray.kernels.util.place import place

Quantized = TypeVar("Quantized")

_changes = 0  # changes of weights in this process that torch does not count


class QuantizationCache(Generic[Quantized]):
    """Caches the result of `make` for some weights; recomputes it when one of them has changed."""

    def __init__(self, make: Callable[..., Quantized]) -> None:
        self._make = make
        self._kept: tuple[object, Quantized] | None = None

    def get(self, *weights: Tensor) -> Quantized:
        now = (_changes, *((place(weight), weight._version) for weight in weights))
        if self._kept is None or self._kept[0] != now:
            self._kept = None  # frees the old result first
            self._kept = (now, self._make(*weights))
        return self._kept[1]


def weights_changed(*_: Any) -> None:
    """Invalidates all caches in this process."""
    global _changes  # noqa: PLW0603
    _changes += 1


register_optimizer_step_post_hook(weights_changed)
