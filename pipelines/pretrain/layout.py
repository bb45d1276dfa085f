"""The layout that N ranks can train in, and the block size of FP8 moments. Pure Python, so that recipes can be checked
without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCK = 128  # elements of an FP8 moment that share a scale


def dense_ranks(world: int, wanted: int | None) -> int:
    """Ranks over which dense weights are sharded: the largest number that divides both; all by default."""
    return world if wanted is None else math.gcd(world, wanted)


def usable_layout(world: int, ep: int, batches: Sequence[int]) -> tuple[int, int]:
    """(ranks, EP) to train with if `world` ranks are available and the requested EP is `ep`.

    Ranks: the largest number up to `world` that divides all batch sizes; the remaining ranks stay idle. EP: the largest
    that divides both the ranks and `ep`.
    """
    size = next(size for size in range(world, 0, -1) if all(batch % size == 0 for batch in batches))
    return size, math.gcd(size, ep)
