"""The progress of a backward pass: which weights' gradients are complete while those of earlier layers are pending.

Number n is passed once the gradient of what goes into layer n is there, of every forward that the backward is of: then
all that lies after it is done. (torch's engine adds a finished gradient to its weight before it does anything else.)
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

from torch import Tensor


class Milestones:
    """Calls `passed(number)`, in the backward, at each; numbers descend."""

    def __init__(self, passed: Callable[[int], None]) -> None:
        self._passed = passed
        self._to_come: Counter[int] = Counter()

    def set(self, x: Tensor, number: int) -> None:
        """In the forward: the backward passes `number` at the gradient of x."""
        if x.requires_grad:
            self._to_come[number] += 1
            x.register_hook(partial(self._reach, number))  # type: ignore[no-untyped-call]

    def _reach(self, number: int, _: Tensor) -> None:
        self._to_come[number] -= 1
        if not self._to_come[number]:
            self._passed(number)
