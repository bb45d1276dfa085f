"""The layout that N ranks can train in, and the block size of FP8 moments. Pure Python, so that recipes can be checked
without torch."""

from __future__ import annotations

import math

BLOCK = 128  # elements of an FP8 moment that share a scale


def dense_ranks(world: int, wanted: int | None) -> int:
    """Ranks over which dense weights are sharded: the largest number above 1 that divides both; else, and by default,
    all."""
    shared = math.gcd(world, wanted or world)
    return shared if shared > 1 else world


def usable_layout(world: int, ep: int) -> tuple[int, int]:
    """(ranks, EP) to train with if `world` ranks are available and the requested EP is `ep`.

    EP: the requested one, or the largest divisor of it that there are ranks for. Ranks: as many as there are, in whole
    EP groups; the remaining ranks stay idle.
    """
    usable = next(size for size in range(min(ep, world), 0, -1) if ep % size == 0)
    return world - world % usable, usable
