"""The terms of the training loss, as sums over a batch.

Shapes: B batch, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moray.models.expert_parallel.stages import Routing


@dataclass(frozen=True)
class TrainingLoss:
    """Sums over a batch; dividing each by the (global) count gives the mean per token.

    main: -log p of the next token. mtp: the loss of multi-token prediction, averaged over its depths (0 without MTP).
    balance: the layers' sequence-wise balance losses, 1 per layer and counted token if the load is even. count: counted
    tokens, int64. sequences: float64 [B, 2], the main loss and the counted tokens of each sequence, without a graph.
    """

    main: Tensor
    mtp: Tensor
    balance: Tensor
    count: Tensor
    sequences: Tensor

    def __add__(self, other: "TrainingLoss") -> "TrainingLoss":
        """The loss of both batches, the sequences of `other` last."""
        return TrainingLoss(
            self.main + other.main,
            self.mtp + other.mtp,
            self.balance + other.balance,
            self.count + other.count,
            torch.cat((self.sequences, other.sequences)),
        )


@dataclass(frozen=True)
class LossWeights:
    """The factors of `mtp` and `balance` in the loss whose gradient is computed; that of `main` is 1."""

    mtp: float
    balance: float

    def of(self, loss: TrainingLoss) -> Tensor:
        """The weighted sum of the terms."""
        return loss.main + self.mtp * loss.mtp + self.balance * loss.balance


def counted_positions(targets_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """bool [B, T]: positions whose target is not negative and, if there is a mask, whose mask is true."""
    keep_BT = targets_BT >= 0
    return keep_BT if mask_BT is None else keep_BT & mask_BT.bool()


def add_balance(balance: Tensor, routing: Routing | None) -> Tensor:
    """Adds one layer's balance loss, if it has one, to the sum of the layers before it."""
    return balance if routing is None or routing.balance is None else balance + routing.balance
