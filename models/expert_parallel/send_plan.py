"""Which ranks each token is sent to: once to every rank that holds any of its experts, however many it holds.

With DeepSeek-V3's eight experts of at most four groups, a token is sent half as often as it has experts, or less, and
combine returns half as many rows.

Shapes: T tokens, K slots, P ranks, C rows sent, X columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moray.kernels.permute import sum_slots


@dataclass(frozen=True)
class SendPlan:
    """The rows that a rank sends, by receiving rank, then in the order of tokens. sent_PT: bool, whether rank p gets
    token t."""

    sent_PT: Tensor

    @classmethod
    def of(cls, ids_TK: Tensor, ranks: int, local: int) -> "SendPlan":
        """For tokens routed to the experts ids_TK, int64, of which each rank holds `local`."""
        sent_TP = torch.zeros(len(ids_TK), ranks, dtype=torch.bool, device=ids_TK.device)
        return cls(sent_TP.scatter_(1, ids_TK // local, True).t().contiguous())

    def send_counts(self) -> Tensor:
        """Rows for each rank, int64 [P]."""
        return self.sent_PT.sum(1)

    def gather(self, rows_TX: Tensor, count: int) -> Tensor:
        """The rows to send: rows_CX. `count` is C, which is given so that no device has to be asked for it."""
        return rows_TX.index_select(0, torch.nonzero_static(self.sent_PT, size=count)[:, 1])

    def reduce(self, rows_CX: Tensor) -> Tensor:
        """The sum over ranks of each token's rows: rows_TX."""
        places_PT = self.sent_PT.flatten().cumsum(0).view_as(self.sent_PT) - 1
        return sum_slots(rows_CX, torch.where(self.sent_PT, places_PT, -1).t())
