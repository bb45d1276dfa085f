"""Baselines that a trained language model must beat: a unigram token model and an order-2 byte model.

Both are trained on the whole training part, so on at least the data that the model was trained on.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LN2 = float(np.log(2))


class UnigramModel:
    """Token frequencies with add-one smoothing."""

    def __init__(self, vocab_size: int) -> None:
        self._counts = np.ones(vocab_size, np.int64)

    def add(self, ids: npt.NDArray[np.int64]) -> None:
        self._counts += np.bincount(ids, minlength=len(self._counts))

    def bits(self, ids: npt.NDArray[np.int64]) -> float:
        """Bits to code `ids` independently of each other."""
        log = np.log(self._counts / self._counts.sum())
        return float(-log[ids].sum() / LN2)


class ByteCounts:
    """Counts of each byte after each pair of bytes. Each document is preceded by two zero bytes."""

    def __init__(self) -> None:
        self.counts = np.zeros((1 << 16, 256), np.int32)

    def add(self, text: bytes) -> None:
        context, following = _contexts(text)
        np.add.at(self.counts, (context, following), 1)


class ByteModel:
    """P(byte | two bytes before), Witten-Bell interpolated with orders 1 and 0 and the uniform distribution.

    The weight of an order relative to the next lower one is n / (n + distinct), where n is the context's count and
    `distinct` the number of different bytes after it (Witten and Bell, 1991, method C).
    """

    def __init__(self, counts: ByteCounts) -> None:
        order1 = counts.counts.reshape(256, 256, 256).sum(axis=0, dtype=np.int64)
        self._orders = [_Order(order1.sum(axis=0)[None]), _Order(order1), _Order(counts.counts)]

    def bits(self, text: bytes) -> float:
        """Bits to code `text`."""
        context, following = _contexts(text)
        p = np.full(len(following), 1 / 256)
        for order, row in zip(self._orders, (np.zeros_like(context), context & 255, context), strict=True):
            p = order.refine(row, following, p)
        return float(-np.log2(p).sum())


class _Order:
    """Counts of one context length, [contexts, 256], with each context's total and number of distinct bytes."""

    def __init__(self, counts: npt.NDArray[np.int64] | npt.NDArray[np.int32]) -> None:
        self._counts = counts
        self._total = counts.sum(axis=1, dtype=np.int64)
        self._distinct = np.count_nonzero(counts, axis=1)

    def refine(
        self, row: npt.NDArray[np.int64], following: npt.NDArray[np.int64], lower: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Interpolates with the lower order's probabilities `lower`, which are unchanged for an unseen context."""
        distinct = self._distinct[row]
        mixed = self._counts[row, following] + distinct * lower
        total = self._total[row]
        return np.where(total > 0, mixed / np.maximum(total + distinct, 1), lower)


def _contexts(text: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(the two bytes before, as a number; the byte) at every position of `text`."""
    data = np.frombuffer(b"\0\0" + text, np.uint8).astype(np.int64)
    return data[:-2] * 256 + data[1:-1], data[2:]
