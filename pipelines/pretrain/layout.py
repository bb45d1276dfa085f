"""How many ranks can train, and the blocks of moments in FP8. Pure Python: a recipe is checked without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCK = 128  # numbers that share a scale in a moment in FP8


def usable_layout(world: int, ep: int, batches: Sequence[int]) -> tuple[int, int]:
    """(ranks, EP) to train with where there are `world` ranks and `ep` was wished for.

    As many ranks as divide all batches, the others having nothing to do; the largest EP that divides them and `ep`.
    """
    size = next(size for size in range(world, 0, -1) if all(batch % size == 0 for batch in batches))
    return size, math.gcd(size, ep)
