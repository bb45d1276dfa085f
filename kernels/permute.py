"""Sorting (token, slot) pairs by expert, and moving rows along that order.

Notable: no atomics anywhere. The backward of a gather by a permutation is the gather by its inverse, so gradients
are bit-identical from run to run, also on a GPU, where a scatter-add is not. The sort is stable: an expert's rows
keep the order of the tokens, whatever the other experts got.

Shapes: T tokens, K slots, R = T * K pairs (pair t * K + k is slot k of token t), E experts, D row width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairOrder:
    """order_R: pairs sorted by expert; inverse_R: where each pair went; counts_E: pairs per expert. All int64."""

    order_R: Tensor
    inverse_R: Tensor
    counts_E: Tensor


def inverse_permutation(order_R: Tensor) -> Tensor:
    """The permutation that undoes `order_R`."""
    places = torch.arange(order_R.shape[0], device=order_R.device)
    return torch.empty_like(order_R).scatter_(0, order_R, places)


def sort_pairs_reference(expert_ids_TK: Tensor, num_experts: int) -> PairOrder:
    """Sorts the flattened (token, slot) pairs stably by expert id."""
    sorted_R, order_R = expert_ids_TK.flatten().sort(stable=True)
    edges = torch.arange(num_experts + 1, device=sorted_R.device, dtype=sorted_R.dtype)
    counts_E = torch.searchsorted(sorted_R, edges).diff()
    return PairOrder(order_R, inverse_permutation(order_R), counts_E)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.slots = slots
        return x_TD.index_select(0, order_R // slots)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (inverse_R,) = ctx.saved_tensors
        by_token_TKD = grads[0].index_select(0, inverse_R).unflatten(0, (-1, ctx.slots))
        return by_token_TKD.sum(1), None, None, None


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return rows_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (inverse_R,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_R), None, None


def spread_rows(x_TD: Tensor, pairs: PairOrder, slots: int) -> Tensor:
    """One copy of a token's row per slot, sorted by expert: rows_RD."""
    rows: Tensor = _Spread.apply(x_TD, pairs.order_R, pairs.inverse_R, slots)  # type: ignore[no-untyped-call]
    return rows


def move_rows(rows_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """`rows_RD[order_R]`, where `inverse_R` undoes `order_R`."""
    moved: Tensor = _Move.apply(rows_RD, order_R, inverse_R)  # type: ignore[no-untyped-call]
    return moved


sort_pairs = sort_pairs_reference
