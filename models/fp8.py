"""FP8 forms of weights, kept for as long as the weights stay as they are.

A weight is quantised once per optimizer step, not once per micro-batch.

Notable: torch counts the in-place changes of a tensor, but its fused optimizers do not count theirs. So a form is also
made anew after any step of any torch optimizer; whoever changes weights in yet another way calls `weights_changed`.
"""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

Quantized = TypeVar("Quantized")

_changes = 0  # of weights anywhere in this process, as far as torch does not count them


class QuantizationCache(Generic[Quantized]):
    """What `make` makes of some weights, made anew when one of them has changed."""

    def __init__(self, make: Callable[..., Quantized]) -> None:
        self._make = make
        self._kept: tuple[object, Quantized] | None = None

    def get(self, *weights: Tensor) -> Quantized:
        now = (_changes, *((weight.data_ptr(), weight._version) for weight in weights))
        if self._kept is None or self._kept[0] != now:
            self._kept = None  # what is out of date goes before its successor comes
            self._kept = (now, self._make(*weights))
        return self._kept[1]


def weights_changed(*_: Any) -> None:
    """Makes all forms in this process out of date."""
    global _changes  # noqa: PLW0603
    _changes += 1


register_optimizer_step_post_hook(weights_changed)
