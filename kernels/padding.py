"""Pads packed rows sorted by expert to groups that begin at multiples of 128, and removes the padding.

This is for rows that are already packed by expert. For tokens that are sorted on this rank, `permute.permute_padded`
writes rows to their padded positions directly.

Shapes: R packed rows, P padded rows, E experts, D row width.
"""

from typing import Any

import torch
from torch import Tensor

from moray.kernels.permute import TILE, PaddedOrder, padded_capacity, permute_padded


def group_order(counts_E: Tensor, rows: int, device: torch.device) -> PaddedOrder:
    """The padded order of `rows` packed rows, `counts_E` per expert (on any device). Does not synchronize with a
    device."""
    counts_E = counts_E.to(device, non_blocking=True)
    ends_E = counts_E.cumsum(0)
    offsets_E1 = torch.zeros(len(counts_E) + 1, dtype=torch.int64, device=device)
    offsets_E1[1:] = ((counts_E + TILE - 1) // TILE * TILE).cumsum(0)
    places_R = torch.arange(rows, device=device)
    experts_R = torch.searchsorted(ends_E, places_R, right=True).clamp_(max=len(counts_E) - 1)
    padded_R = places_R + (offsets_E1[:-1] - (ends_E - counts_E))[experts_R]
    return PaddedOrder(padded_R.int().unsqueeze(1), offsets_E1.int(), counts_E.int())


def pad_groups(rows_RD: Tensor, weights_R: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, PaddedOrder]:
    """Returns (rows at their padded positions, with zeros between; their weights; the order). Differentiable."""
    order = group_order(counts_E, rows_RD.shape[0], rows_RD.device)
    capacity = padded_capacity(rows_RD.shape[0], len(counts_E))
    places_R = order.positions_TK.squeeze(1).long()
    weights_P = weights_R.new_zeros(capacity).index_copy(0, places_R, weights_R)
    return permute_padded(rows_RD, order, capacity), weights_P, order


class _UnpadGroups(torch.autograd.Function):
    """The inverse of `permute_padded` for one slot. Saves no rows for the backward."""

    @staticmethod
    def forward(ctx: Any, rows_PD: Tensor, order: PaddedOrder) -> Tensor:
        ctx.order, ctx.capacity = order, len(rows_PD)
        return rows_PD.index_select(0, order.positions_TK.squeeze(1))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return permute_padded(grads[0], ctx.order, ctx.capacity), None


def unpad_groups(rows_PD: Tensor, order: PaddedOrder) -> Tensor:
    """The packed rows of `order`. Differentiable."""
    rows_RD: Tensor = _UnpadGroups.apply(rows_PD, order)  # type: ignore[no-untyped-call]
    return rows_RD
