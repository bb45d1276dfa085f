"""Rows that arrived, spread over the experts here; and each row's results, summed.

Shapes: A rows that arrived, K slots, L experts here, R rows at the experts: pairs (row, slot) whose expert is here, D
columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moray.kernels.permute import sum_slots


@dataclass(frozen=True)
class Spread:
    """order_R: the pairs here, by expert, then in the order of arrival (pair a * K + k is slot k of row a). places_AK:
    where each pair went; -1 where its expert is elsewhere."""

    order_R: Tensor
    places_AK: Tensor

    @classmethod
    def of(cls, ids_AK: Tensor, local: int, rows: int) -> "Spread":
        """For rows that go to the experts ids_AK of `local` here, -1 for those elsewhere; R = `rows` pairs are here,
        which a device need not be asked for."""
        experts_S = torch.where(ids_AK < 0, local, ids_AK).flatten()
        order_R = experts_S.argsort(stable=True)[:rows]
        places_S = torch.full_like(experts_S, -1, dtype=torch.int64)
        places_S[order_R] = torch.arange(rows, device=ids_AK.device)
        return cls(order_R, places_S.view_as(ids_AK))

    def rows(self, rows_AD: Tensor) -> Tensor:
        """Each row at all its experts: rows_RD."""
        return rows_AD.index_select(0, self.order_R // self.places_AK.shape[1])

    def weights(self, weights_AK: Tensor) -> Tensor:
        """The weight of each row at the experts: weights_R."""
        return weights_AK.flatten().index_select(0, self.order_R)

    def sums(self, rows_RD: Tensor) -> Tensor:
        """The sum over its slots of what the experts made of a row: rows_AD."""
        return sum_slots(rows_RD, self.places_AK)

    def slots(self, weights_R: Tensor) -> Tensor:
        """The weights where they came from, weights_AK; 0 where an expert is elsewhere."""
        weights_S = weights_R.new_zeros(self.places_AK.numel())
        weights_S[self.order_R] = weights_R
        return weights_S.view_as(self.places_AK)
