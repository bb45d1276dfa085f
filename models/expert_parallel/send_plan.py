"""The send plan: each token is sent once to every part of a group that holds any of its experts, however many.

A part is a rank, or a node. With DeepSeek-V3's eight experts of at most four groups, a token is sent at most half as
often as it has experts, and combine returns at most half as many rows.

Shapes: T tokens, K slots, P parts, C rows sent, X columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moray.kernels.permute import sum_slots


@dataclass(frozen=True)
class SendPlan:
    """The rows that a rank sends, by receiving part, then in token order. sent_PT: bool, whether token t is sent to
    part p.

    A plan made from corrupt ids has another number of rows than was announced. It moves wrong rows then, but none from
    outside of a tensor, so that `exchange_check.py` can report it.
    """

    sent_PT: Tensor

    @classmethod
    def of(cls, ids_TK: Tensor, parts: int, local: int, first: int = 0) -> "SendPlan":
        """The plan for tokens routed to the experts ids_TK. Part p holds the `local` experts from first + p * local on.
        Other experts are ignored."""
        parts_TK = (ids_TK - first) // local
        parts_TK = torch.where((parts_TK >= 0) & (parts_TK < parts), parts_TK, parts)
        sent_TP = torch.zeros(len(ids_TK), parts + 1, dtype=torch.bool, device=ids_TK.device)
        return cls(sent_TP.scatter_(1, parts_TK.long(), True)[:, :parts].t().contiguous())

    def send_counts(self) -> Tensor:
        """Rows for each part, int64 [P]."""
        return self.sent_PT.sum(1)

    def totals(self, values_T: Tensor) -> Tensor:
        """The sum of an integer per token over the tokens sent to each part, int64 [P]."""
        return torch.where(self.sent_PT, values_T, 0).sum(1)

    def grouped(self, size: int) -> "SendPlan":
        """The plan whose parts are `size` consecutive parts of this one."""
        parts, tokens = self.sent_PT.shape
        return SendPlan(self.sent_PT.view(parts // size, size, tokens).any(1))

    def gather(self, rows_TX: Tensor, count: int) -> Tensor:
        """The rows to send: rows_CX. `count` is C; it is passed in so that no device is synchronized."""
        tokens_C = torch.nonzero_static(self.sent_PT, size=count)[:, 1]  # -1 where there are fewer
        return rows_TX.index_select(0, tokens_C.clamp(min=0))

    def reduce(self, rows_CX: Tensor) -> Tensor:
        """The sum over parts of each token's rows: rows_TX."""
        places_PT = self.sent_PT.flatten().cumsum(0).view_as(self.sent_PT) - 1
        sent_PT = self.sent_PT & (places_PT < len(rows_CX))
        return sum_slots(rows_CX, torch.where(sent_PT, places_PT, -1).t())
