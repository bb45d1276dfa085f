"""Gradients of weights that wait until there is time for them (the W of zero-bubble schedules, DeepSeek-V3 §3.2.1).

A backward needs the gradient of an input at once, since the layers before it wait for that; the gradient of a weight
nobody needs before the optimizer does. So it may be computed while a rank would only wait for rows to arrive.

Notable: first in, first out. So a weight's gradients are added in one order, whenever that happens, and what comes out
does not depend on how long communication took.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class DeferredGradients:
    """Weight gradients to be computed: at most `limit` at a time, since each holds its rows in memory."""

    def __init__(self, limit: int = 128) -> None:
        self._limit = limit
        self.added = 0  # so far
        self._waiting: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, compute: Callable[[], None]) -> None:
        """Puts one off; if there are too many, the oldest is computed now."""
        self._waiting.append(compute)
        self.added += 1
        if len(self._waiting) > self._limit:
            self._next()

    def fill(self, done: Callable[[], bool]) -> None:
        """Computes one after another until `done`, or until none is left."""
        while self._waiting and not done():
            self._next()

    def finish(self, added: int | None = None) -> None:
        """Computes what is left: the first so many that were added, or all, as at the end of a backward."""
        last = self.added if added is None else added
        self.fill(lambda: self.added - len(self._waiting) >= last)

    def _next(self) -> None:
        with torch.no_grad():
            self._waiting.popleft()()


def add_gradient(weight: Tensor, gradient: Tensor, index: int | None = None) -> None:
    """Adds to the weight's gradient, or to that of `weight[index]`; in the weight's dtype."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    (weight.grad if index is None else weight.grad[index]).add_(gradient)


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
    """x @ weight^T in x's dtype, or of `weight[index]` of a stack. Differentiable in x; the gradient of `weight`, a
    leaf, comes about when `deferred` computes it."""
    out: Tensor = _DeferredLinear.apply(x, weight, index, deferred)  # type: ignore[no-untyped-call]
    return out
