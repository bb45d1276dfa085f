"""Intervals of shares, and the comparison of two models on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959964  # of 95 %


def wilson(right: float, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927), which holds for few items and for shares of 0 and 1 too."""
    share, square = right / n, _Z**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = _Z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items. difference: of the second model's share to the first one's, with its 95 % interval.
    only_first, only_second: items that only one of them has right. p: of the exact test of McNemar (1947)."""

    n: int
    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    only_first: int
    only_second: int
    p: float


def compare_items(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compares scores of 0 and 1 of the same items, in the same order."""
    n = len(first)
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(b > a for a, b in zip(first, second, strict=True))
    difference = (only_second - only_first) / n
    # Half an item more in each of the four cells, so that it holds for few items too (Agresti and Min, 2005).
    more = n + 2
    middle = (only_second - only_first) / more
    half = _Z * math.sqrt(only_first + only_second + 1 - (only_second - only_first) ** 2 / more) / more
    interval = (max(-1.0, middle - half), min(1.0, middle + half))
    p = _sign_test(only_first, only_second)
    return Comparison(n, sum(first) / n, sum(second) / n, difference, interval, only_first, only_second, p)


def _sign_test(one: int, other: int) -> float:
    """Two-sided p of so many coin tosses."""
    n, least = one + other, min(one, other)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    return min(1.0, 2 * tail)
