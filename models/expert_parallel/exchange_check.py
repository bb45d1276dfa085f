"""Checks that ranks receive the expert ids that were sent to them.

A transport that delivers wrong bytes raises no error: NCCL has delivered token ids shifted by bytes. So before its rows
a rank sends the sum of their expert ids, and the receiver compares. The result stays on the device, and a training step
reads it with its loss; so a check costs a few small kernels and no synchronization.

It is cheap, not complete: it finds rows that are shifted, missing or from elsewhere, but not two rows in each other's
place, and not a wrong number in a row. Sums and gradients carry no ids.

Shapes: P senders, A received rows, K slots.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


class CorruptExchange(RuntimeError):
    """Ranks received rows with other expert ids, or other counts, than were sent."""


class ExchangeCheck:
    """Counts the exchanges of a run that delivered other ids, by layer and sender."""

    def __init__(self) -> None:
        # (layer, ranks that sent) -> [P]. Not one sum: hops of two streams, or threads, would add to it at once.
        self._wrong: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def compare(self, layer: int, senders: tuple[int, ...], sums_P: Tensor, rows_P: Tensor, ids_AK: Tensor) -> None:
        """Compares the sums of ids that rank `senders[p]` announced with those of its rows_P[p] rows of ids_AK, which
        are in the order of senders."""
        totals_A1 = torch.zeros(len(ids_AK) + 1, dtype=torch.int64, device=ids_AK.device)
        torch.cumsum(ids_AK.sum(1), 0, out=totals_A1[1:])
        ends_P = rows_P.cumsum(0)
        wrong_P = (totals_A1[ends_P] - totals_A1[ends_P - rows_P] != sums_P).long()
        place = (layer, senders)
        self._wrong[place] = self._wrong[place].add_(wrong_P) if place in self._wrong else wrong_P

    def total(self) -> Tensor | int:
        """How many comparisons failed, on the device. The rows must have been waited for."""
        return torch.cat(list(self._wrong.values())).sum() if self._wrong else 0

    def found(self) -> Iterator[tuple[int, int]]:
        """(layer, rank that sent) of comparisons that failed."""
        for (layer, senders), wrong_P in sorted(self._wrong.items(), key=lambda item: item[0]):
            yield from ((layer, senders[at]) for at in wrong_P.nonzero().flatten().tolist())
