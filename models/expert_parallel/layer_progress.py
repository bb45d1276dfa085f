"""The progress of micro-batches through the layers, forward and backward, for what has to happen between them.

The stages of a model are the embedding (-1), its layers (0 to N - 1), and the end (N): last norm, head and multi-token
prediction. Micro-batches that run together are in different stages at the same time. Boundary n is between the stages
n - 1 and n. In the backward a micro-batch crosses it when the gradient of stage n's input is complete, and with it the
gradients of the stage's weights. (torch's engine adds a finished gradient to its weight before it runs the next node.)
"""

from collections import Counter
from functools import partial

from torch import Tensor


class LayerObserver:
    """Is told when micro-batches enter and leave stages, and does nothing by default. In the forward stages ascend, in
    the backward they descend."""

    def forward_enters(self, stage: int) -> None:
        """The first micro-batch is about to run the stage."""

    def forward_left(self, stage: int) -> None:
        """All micro-batches have run the stage."""

    def backward_enters(self, stage: int) -> None:
        """The backward of the first micro-batch is about to run the stage."""

    def backward_left(self, stage: int) -> None:
        """The gradients of the stage's weights are complete, but for deferred ones."""


class LayerProgress:
    """Tells an observer of `last + 1` stages. `micro_batches`: how many forwards run together, then one backward."""

    def __init__(self, observer: LayerObserver, last: int) -> None:
        self.micro_batches = 1
        self._observer, self._last = observer, last
        self._crossed: Counter[int] = Counter()  # by boundary, in the forward
        self._to_come: Counter[int] = Counter()  # in the backward
        self._reached: Counter[int] = Counter()

    def begin(self) -> None:
        """A micro-batch begins its forward."""
        self._count(-1)

    def cross(self, x: Tensor, boundary: int) -> None:
        """A micro-batch crosses a boundary in the forward with hidden states x, and will in the backward."""
        self._count(boundary)
        if x.requires_grad:
            self._to_come[boundary] += 1
            x.register_hook(partial(self._reach, boundary))  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """A micro-batch has ended its forward."""
        self._count(self._last + 1)

    def begin_backward(self) -> None:
        self._observer.backward_enters(self._last)

    def end_backward(self) -> None:
        self._observer.backward_left(-1)

    def _count(self, boundary: int) -> None:
        self._crossed[boundary] += 1
        first, all_ = self._crossed[boundary] == 1, self._crossed[boundary] == self.micro_batches
        if all_:  # first, so that an observer frees before it allocates
            self._crossed[boundary] = 0
            if boundary > -1:
                self._observer.forward_left(boundary - 1)
        if first and boundary <= self._last:
            self._observer.forward_enters(boundary)

    def _reach(self, boundary: int, _: Tensor) -> None:
        self._reached[boundary] += 1
        first, all_ = self._reached[boundary] == 1, self._reached[boundary] == self._to_come[boundary]
        if all_:
            self._reached[boundary] = self._to_come[boundary] = 0
            self._observer.backward_left(boundary)
        if first:
            self._observer.backward_enters(boundary - 1)
