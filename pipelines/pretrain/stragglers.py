"""Stragglers: ranks whose busy time is longer than that of the others, which wait for them in every collective.

Busy time is a rank's time outside of collectives, waits for its data included. Every rank measures its own. The times
travel in the all-reduce that sums the losses, so comparing them costs no collective and no synchronization.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from moray.pipelines.pretrain.config import Stragglers
from moray.pipelines.pretrain.stopwatch import Stopwatch
from moray.pipelines.pretrain.streaks import Streaks

_NAMED = 8  # ranks in a warning


class BusyTimer:
    """Measures this rank's busy time per step. The first step is not counted: kernels are compiled and loaded in it.

    clock: measures the time in collectives. every: steps between comparisons.
    """

    def __init__(self, clock: Stopwatch, every: int) -> None:
        self._clock, self._every = clock, every
        self._warm = False
        self._seconds, self._steps = 0.0, 0

    @contextmanager
    def step(self, waited: float) -> Iterator[None]:
        """Times a training step that waited `waited` seconds for its batch before the block."""
        began, before = time.monotonic(), self._clock.total()
        yield
        if self._warm:
            self._seconds += waited + time.monotonic() - began - (self._clock.total() - before)
            self._steps += 1
        self._warm = True

    def due(self, step: int) -> float | None:
        """Seconds per step since the last comparison, if ranks are compared in this step; 0 if none was measured.

        The same steps are due on every rank, also after a restart.
        """
        if step % self._every:
            return None
        seconds = max(0.0, self._seconds) / max(1, self._steps)
        self._seconds, self._steps = 0.0, 0
        return seconds


@dataclass(frozen=True)
class SlowestRank:
    """The rank with the longest busy time. seconds, median: busy time per step, of it and of the median rank. excess:
    the first over the second, minus 1."""

    rank: int
    seconds: float
    median: float

    @property
    def excess(self) -> float:
        return self.seconds / self.median - 1


def slowest_rank(busy_R: Sequence[float]) -> SlowestRank | None:
    """The slowest of R ranks, the first one of equals; None for one rank, or if half of the times are 0."""
    if len(busy_R) < 2:
        return None
    median, rank = float(np.median(busy_R)), int(np.argmax(busy_R))
    return SlowestRank(rank, busy_R[rank], median) if median > 0 else None


class StragglerWatch:
    """Judges one comparison after another, and describes the ranks that stay slow. hosts: of each rank."""

    def __init__(self, rules: Stragglers, hosts: Sequence[str]) -> None:
        self._rules, self._hosts = rules, hosts
        self._streaks = Streaks(len(hosts), rules.reports)

    def update(self, busy_R: Sequence[float]) -> tuple[SlowestRank | None, str]:
        """(the slowest rank, a warning about ranks that have been slow for `reports` comparisons, or "").

        Every rank has its own streak, because the ranks of a slow host take turns at being the slowest.
        """
        slowest = slowest_rank(busy_R)
        if slowest is None:
            return None, ""
        slow_R = np.asarray(busy_R) > slowest.median * (1 + self._rules.excess)
        ranks = self._streaks.update(slow_R)
        return slowest, self._warning(ranks, busy_R, slowest.median) if ranks else ""

    def exceeds(self, slowest: SlowestRank) -> bool:
        """Whether the slowest rank is slow by the rules."""
        return slowest.excess > self._rules.excess

    def place(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

    def _warning(self, ranks: list[int], busy_R: Sequence[float], median: float) -> str:
        worst = sorted(ranks, key=lambda rank: -busy_R[rank])[:_NAMED]
        places = ", ".join(f"{self.place(rank)} (+{busy_R[rank] / median - 1:.0%})" for rank in worst)
        more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
        return (
            f"slow for {self._rules.reports} comparisons in a row: {places}{more}. The median rank is busy for "
            f"{median:.3g} s per step, and all ranks wait for the slowest one. Check these hosts, or the load of the "
            "experts that the ranks hold"
        )
