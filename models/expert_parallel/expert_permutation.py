"""Expands received rows into the order of the local experts, and sums the experts' results for each received row.

Rows in FP8 are expanded as they are, and every expert's begin at a multiple of 128, as FP8 GEMMs require.

Shapes: A received rows, K slots, L local experts, D columns, R rows at the experts: pairs (row, slot) whose expert is
local, or the capacity of a padded buffer.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moray.kernels.fp8_rows import Fp8Rows
from moray.kernels.permute import PaddedOrder, padded_order, permute_fp8, sum_slots


class ExpertPermutation(Protocol):
    """The order of received rows at the local experts."""

    @property
    def offsets_L1(self) -> Tensor | None:  # noqa: N802
        """int32: where each expert's rows begin, and the end. None if there is nothing between them."""

    def expand(self, rows_AD: Tensor) -> Tensor:
        """Repeats each row for each of its local experts: rows_RD."""

    def expand_weights(self, weights_AK: Tensor) -> Tensor:
        """The router's weight of each expanded row: weights_R."""

    def reduce(self, rows_RD: Tensor) -> Tensor:
        """The sum of the results for each received row: rows_AD."""

    def to_slots(self, weights_R: Tensor) -> Tensor:
        """The inverse of `expand_weights`: weights_AK, 0 if an expert is on another rank."""


def expert_permutation(ids_AK: Tensor, local: int, rows: int, fp8: bool) -> ExpertPermutation:
    """The permutation of rows routed to the local experts ids_AK in [0, local), -1 for others. `rows`, the number of
    local pairs, is passed in so that no device is synchronized. fp8: for `Fp8Rows`."""
    if fp8:
        return PaddedPermutation(padded_order(ids_AK, local, local=rows))
    return PackedPermutation.of(ids_AK, local, rows)


@dataclass(frozen=True)
class PaddedPermutation:
    """For rows in FP8. Padding has the weight 0."""

    order: PaddedOrder

    @property
    def offsets_L1(self) -> Tensor:  # noqa: N802
        return self.order.offsets_E1

    def expand(self, rows_AD: Tensor) -> Tensor:
        assert isinstance(rows_AD, Fp8Rows)
        return Fp8Rows(*permute_fp8(rows_AD.fp8, rows_AD.scales, self.order), rows_AD.dtype)

    def expand_weights(self, weights_AK: Tensor) -> Tensor:
        places_AK, capacity = self.order.positions_TK, self.order.capacity
        places_S = torch.where(places_AK < 0, capacity, places_AK).flatten().long()  # one more place, for other ranks'
        return weights_AK.new_zeros(capacity + 1).index_copy_(0, places_S, weights_AK.flatten())[:capacity]

    def reduce(self, rows_RD: Tensor) -> Tensor:
        return sum_slots(rows_RD, self.order.positions_TK)

    def to_slots(self, weights_R: Tensor) -> Tensor:
        places_AK = self.order.positions_TK
        if not len(weights_R):  # every expert is on another rank
            return weights_R.new_zeros(places_AK.shape)
        return torch.where(places_AK < 0, 0.0, weights_R[places_AK.clamp(min=0)])


@dataclass(frozen=True)
class PackedPermutation:
    """For rows in high precision, without padding.

    order_R: the local pairs, by expert, then in the order of received rows (pair a * K + k is slot k of row a).
    places_AK: the position of each pair in that order; -1 if its expert is on another rank."""

    order_R: Tensor
    places_AK: Tensor
    offsets_L1: None = None

    @classmethod
    def of(cls, ids_AK: Tensor, local: int, rows: int) -> "PackedPermutation":
        """`expert_permutation` of rows in high precision."""
        experts_S = torch.where(ids_AK < 0, local, ids_AK).flatten()
        order_R = experts_S.argsort(stable=True)[:rows]
        places_S = torch.full_like(experts_S, -1, dtype=torch.int64)
        places_S[order_R] = torch.arange(rows, device=ids_AK.device)
        return cls(order_R, places_S.view_as(ids_AK))

    def expand(self, rows_AD: Tensor) -> Tensor:
        return rows_AD.index_select(0, self.order_R // self.places_AK.shape[1])

    def expand_weights(self, weights_AK: Tensor) -> Tensor:
        return weights_AK.flatten().index_select(0, self.order_R)

    def reduce(self, rows_RD: Tensor) -> Tensor:
        return sum_slots(rows_RD, self.places_AK)

    def to_slots(self, weights_R: Tensor) -> Tensor:
        weights_S = weights_R.new_zeros(self.places_AK.numel())
        weights_S[self.order_R] = weights_R
        return weights_S.view_as(self.places_AK)
