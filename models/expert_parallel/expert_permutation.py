"""Expands received rows into the order of the local experts, and sums the experts' results for each received row.

Shapes: A received rows, K slots, L local experts, R rows at the experts: pairs (row, slot) whose expert is local, D
columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moray.kernels.permute import sum_slots


@dataclass(frozen=True)
class ExpertPermutation:
    """order_R: the local pairs, by expert, then in the order of received rows (pair a * K + k is slot k of row a).
    places_AK: the position of each pair in that order; -1 if its expert is on another rank."""

    order_R: Tensor
    places_AK: Tensor

    @classmethod
    def of(cls, ids_AK: Tensor, local: int, rows: int) -> "ExpertPermutation":
        """The permutation of rows routed to the local experts ids_AK in [0, local), -1 for others. R = `rows`, the
        number of local pairs, is passed in so that no device is synchronized."""
        experts_S = torch.where(ids_AK < 0, local, ids_AK).flatten()
        order_R = experts_S.argsort(stable=True)[:rows]
        places_S = torch.full_like(experts_S, -1, dtype=torch.int64)
        places_S[order_R] = torch.arange(rows, device=ids_AK.device)
        return cls(order_R, places_S.view_as(ids_AK))

    def expand(self, rows_AD: Tensor) -> Tensor:
        """Repeats each row for each of its local experts: rows_RD."""
        return rows_AD.index_select(0, self.order_R // self.places_AK.shape[1])

    def expand_weights(self, weights_AK: Tensor) -> Tensor:
        """The router's weight of each expanded row: weights_R."""
        return weights_AK.flatten().index_select(0, self.order_R)

    def reduce(self, rows_RD: Tensor) -> Tensor:
        """The sum of the results for each received row: rows_AD."""
        return sum_slots(rows_RD, self.places_AK)

    def to_slots(self, weights_R: Tensor) -> Tensor:
        """The inverse of `expand_weights`: weights_AK, 0 if an expert is on another rank."""
        weights_S = weights_R.new_zeros(self.places_AK.numel())
        weights_S[self.order_R] = weights_R
        return weights_S.view_as(self.places_AK)
