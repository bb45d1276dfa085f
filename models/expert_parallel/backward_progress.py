"""The progress of a backward pass: reports when the gradients of a layer and all later ones are complete.

Milestone n is passed once the gradient of layer n's input is computed, for every forward that the backward covers. The
gradients of all later weights are then complete. (torch's engine adds a finished gradient to its weight before it runs
the next node.)
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

from torch import Tensor


class Milestones:
    """Calls `passed(number)` in the backward at each milestone; numbers descend."""

    def __init__(self, passed: Callable[[int], None]) -> None:
        self._passed = passed
        self._to_come: Counter[int] = Counter()

    def set(self, x: Tensor, number: int) -> None:
        """Sets a milestone in the forward: the backward passes `number` at the gradient of x."""
        if x.requires_grad:
            self._to_come[number] += 1
            x.register_hook(partial(self._reach, number))  # type: ignore[no-untyped-call]

    def _reach(self, number: int, _: Tensor) -> None:
        self._to_come[number] -= 1
        if not self._to_come[number]:
            self._passed(number)
