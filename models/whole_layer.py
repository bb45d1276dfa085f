"""A layer of which only the input is kept: the backward runs it again, with its router's choices and its exchanges.

The input may be kept on the host (`offload`), which costs two copies over the bus to it.

Micro-batches that run together recompute together, so that their exchanges overlap in the backward too. One node of
autograd's graph stands for the layer of all of them.

Shapes: B batch, T tokens, D hidden size, K slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moray.kernels.util.device import runtime
from moray.models.decoder import Attend, DecoderLayer
from moray.models.expert_parallel.interleave import Parts, interleave
from moray.models.expert_parallel.stages import Routing, RoutingContext, layer_parts

Output = tuple[Tensor, Routing | None]


@dataclass
class WholeLayer:
    """Implements `interleave.Together`: one micro-batch's layer. chosen_TK: the experts of the first run."""

    layer: DecoderLayer
    x_BTD: Tensor
    attend: Attend
    context: RoutingContext
    chosen_TK: Tensor | None = None

    def run(self, all_: Sequence["WholeLayer"]) -> list[Output]:
        """Runs the layer for all micro-batches."""
        routings: list[Routing | None] = []
        tensors = _WholeLayers.apply(all_, routings, *(one.x_BTD for one in all_))  # type: ignore[no-untyped-call]
        balances = iter(tensors[len(all_) :])
        found = [None if one is None else replace(one, balance=next(balances)) for one in routings]
        return list(zip(tensors[: len(all_)], found, strict=True))

    def first(self, x_BTD: Tensor) -> Parts[Output]:
        """The first run, without a graph."""
        context = replace(self.context, run="first")
        y_BTD, routing = yield from layer_parts(self.layer, x_BTD, self.attend, context)
        if routing is not None:
            self.chosen_TK = context.scatter(routing.ids_TK, x_BTD.shape[0] * x_BTD.shape[1])
        return y_BTD, routing

    def again(self, x_BTD: Tensor) -> Parts[Output]:
        """The run in the backward."""
        context = replace(self.context, run="again", forced_ids_TK=self.chosen_TK)
        return (yield from layer_parts(self.layer, x_BTD, self.attend, context))


class _WholeLayers(torch.autograd.Function):
    """xs -> ys, then the balance losses of those with a router."""

    @staticmethod
    def forward(
        ctx: Any, layers: Sequence[WholeLayer], routings: list[Routing | None], *xs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.layers = layers
        ctx.offloaded = layers[0].layer.offload
        if ctx.offloaded:
            ctx.xs = [_to_host(x_BTD) for x_BTD in xs]
        else:
            ctx.save_for_backward(*xs)
        for layer in layers:
            layer.x_BTD = layer.x_BTD.new_empty(0)  # the graph keeps it
        return _tensors(interleave([layer.first(x) for layer, x in zip(layers, xs, strict=True)]), routings)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if ctx.offloaded:
            kept = [torch.empty_like(x_BTD, device=grads[0].device).copy_(x_BTD, non_blocking=True) for x_BTD in ctx.xs]
        else:
            kept = ctx.saved_tensors
        xs = [x_BTD.detach().requires_grad_() for x_BTD in kept]
        layers, ctx.layers, ctx.xs = ctx.layers, None, None  # the loss may keep this node after the backward
        with torch.enable_grad():
            outputs = _tensors(interleave([layer.again(x) for layer, x in zip(layers, xs, strict=True)]), [])
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        return None, None, *(x.grad for x in xs)


def _to_host(x_BTD: Tensor) -> Tensor:
    kept_BTD = runtime(x_BTD.device).host_tensor(x_BTD.shape, x_BTD.dtype)
    return kept_BTD.copy_(x_BTD, non_blocking=True)  # the stream that frees x's memory copies it first


def _tensors(outputs: Sequence[Output], routings: list[Routing | None]) -> tuple[Tensor, ...]:
    """The outputs, then the balance losses. Appends to `routings`."""
    routings += [routing for _, routing in outputs]
    balances = [routing.balance for _, routing in outputs if routing is not None]
    assert all(balance is not None for balance in balances)
    return (*(y_BTD for y_BTD, _ in outputs), *(balance for balance in balances if balance is not None))


def training_layer_parts(
    layer: DecoderLayer, x_BTD: Tensor, attend: Attend, context: RoutingContext
) -> Parts[tuple[Tensor, Routing | None]]:
    """`stages.layer_parts`, or its equal for a layer that the backward recomputes."""
    if not (layer.recompute_whole and torch.is_grad_enabled()):
        return (yield from layer_parts(layer, x_BTD, attend, context))
    output: Output = yield WholeLayer(layer, x_BTD, attend, context)
    return output
