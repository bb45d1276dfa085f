"""One copy of a row for each rank that has experts of its token, whatever their number; of what comes back, the sum.

With DeepSeek-V3's eight experts of at most four groups, a token sends half as many rows as it has experts, or fewer,
and half as many come home.

Shapes: T tokens, K slots, P ranks, C copies, X columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moray.kernels.permute import sum_slots


@dataclass(frozen=True)
class Copies:
    """The copies that a rank sends, rank by rank, in the order of tokens. goes_PT: bool, whether a token goes there."""

    goes_PT: Tensor

    @classmethod
    def of(cls, ids_TK: Tensor, ranks: int, local: int) -> "Copies":
        """For tokens that go to the experts ids_TK, int64, of which each rank has `local`."""
        goes_TP = torch.zeros(len(ids_TK), ranks, dtype=torch.bool, device=ids_TK.device)
        return cls(goes_TP.scatter_(1, ids_TK // local, True).t().contiguous())

    def counts_P(self) -> Tensor:  # noqa: N802
        """How many go to each rank, int64."""
        return self.goes_PT.sum(1)

    def made(self, rows_TX: Tensor, count: int) -> Tensor:
        """The copies of these rows: rows_CX; `count` is C, which a device need not be asked for."""
        return rows_TX.index_select(0, torch.nonzero_static(self.goes_PT, size=count)[:, 1])

    def sums(self, rows_CX: Tensor) -> Tensor:
        """The sum of each token's rows, one for each of its copies: rows_TX."""
        places_PT = self.goes_PT.flatten().cumsum(0).view_as(self.goes_PT) - 1
        return sum_slots(rows_CX, torch.where(self.goes_PT, places_PT, -1).t())
