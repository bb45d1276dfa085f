"""Deferred weight gradients (the W of zero-bubble schedules, DeepSeek-V3 §3.2.1).

The backward needs the gradient of an input (dgrad) immediately, because earlier layers wait for it. The gradient of a
weight (wgrad) is needed only by the optimizer. So a rank can compute it while it would otherwise wait for
communication.

Notable: gradients are computed first in, first out. So a weight's gradients are always added in the same order, and the
result does not depend on how long communication takes.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class DeferredGradients:
    """A queue of weight gradients to compute. It holds at most `limit`, because each keeps its inputs in memory."""

    def __init__(self, limit: int = 128) -> None:
        self._limit = limit
        self.added = 0  # gradients deferred so far
        self._waiting: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, compute: Callable[[], None]) -> None:
        """Defers one gradient. If the queue is full, computes the oldest."""
        self._waiting.append(compute)
        self.added += 1
        if len(self._waiting) > self._limit:
            self._next()

    def fill(self, done: Callable[[], bool]) -> None:
        """Computes gradients until `done()` is true or the queue is empty."""
        while self._waiting and not done():
            self._next()

    def finish(self, added: int | None = None) -> None:
        """Computes the remaining ones of the first `added` gradients; all by default, as at the end of a backward."""
        last = self.added if added is None else added
        self.fill(lambda: self.added - len(self._waiting) >= last)

    def _next(self) -> None:
        with torch.no_grad():
            self._waiting.popleft()()


def gradient_of(weight: Tensor) -> Tensor:
    """The gradient of a leaf, which is zero at first."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
    return weight.grad


def add_gradient(weight: Tensor, gradient: Tensor, index: int | None = None) -> None:
    """Adds to the gradient of `weight`, or of `weight[index]`, in the gradient's dtype."""
    total = gradient_of(weight)
    (total if index is None else total[index]).add_(gradient)


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: int | None, deferred: DeferredGradients) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.index, ctx.deferred = weight, index, deferred
        return F.linear(x, _wide(weight, index, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy,), (x,) = grads, ctx.saved_tensors
        weight, index = ctx.weight, ctx.index

        def compute() -> None:
            add_gradient(weight, dy.flatten(0, -2).t() @ x.flatten(0, -2), index)

        ctx.deferred.add(compute)
        dx = dy @ _wide(weight, index, dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, None


def _wide(weight: Tensor, index: int | None, dtype: torch.dtype) -> Tensor:
    return (weight if index is None else weight[index]).detach().to(dtype)


def deferred_linear(x: Tensor, weight: Tensor, deferred: DeferredGradients, index: int | None = None) -> Tensor:
    """Returns x @ weight^T in x's dtype, for `weight` or `weight[index]` of a stack. Differentiable in x. `deferred`
    computes the gradient of `weight`, which must be a leaf."""
    out: Tensor = _DeferredLinear.apply(x, weight, index, deferred)  # type: ignore[no-untyped-call]
    return out
