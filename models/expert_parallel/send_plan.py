"""The send plan: each token is sent once to every rank that holds any of its experts, however many.

With DeepSeek-V3's eight experts of at most four groups, a token is sent at most half as often as it has experts, and
combine returns at most half as many rows.

Shapes: T tokens, K slots, P ranks, C rows sent, X columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moray.kernels.permute import sum_slots


@dataclass(frozen=True)
class SendPlan:
    """The rows that a rank sends, by receiving rank, then in token order. sent_PT: bool, whether token t is sent to
    rank p."""

    sent_PT: Tensor

    @classmethod
    def of(cls, ids_TK: Tensor, ranks: int, local: int) -> "SendPlan":
        """The plan for tokens routed to the experts ids_TK, int64, with `local` experts per rank."""
        sent_TP = torch.zeros(len(ids_TK), ranks, dtype=torch.bool, device=ids_TK.device)
        return cls(sent_TP.scatter_(1, ids_TK // local, True).t().contiguous())

    def send_counts(self) -> Tensor:
        """Rows for each rank, int64 [P]."""
        return self.sent_PT.sum(1)

    def gather(self, rows_TX: Tensor, count: int) -> Tensor:
        """The rows to send: rows_CX. `count` is C; it is passed in so that no device is synchronized."""
        return rows_TX.index_select(0, torch.nonzero_static(self.sent_PT, size=count)[:, 1])

    def reduce(self, rows_CX: Tensor) -> Tensor:
        """The sum over ranks of each token's rows: rows_TX."""
        places_PT = self.sent_PT.flatten().cumsum(0).view_as(self.sent_PT) - 1
        return sum_slots(rows_CX, torch.where(self.sent_PT, places_PT, -1).t())
