"""Conditions that hold for several reports in a row, each announced once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class Streaks:
    """Finds which of `size` conditions have held for `length` updates in a row.

    A condition is announced once. It can be announced again after it has not held for `length` updates in a row, so
    that a condition near its threshold does not repeat its warning.
    """

    def __init__(self, size: int, length: int) -> None:
        self._length = length
        self._held_N = np.zeros(size, np.int64)  # updates in a row
        self._clear_N = np.zeros(size, np.int64)
        self._announced_N = np.zeros(size, np.bool_)

    def update(self, holds_N: npt.NDArray[np.bool_]) -> list[int]:
        """Adds an update, bool [N]. Returns the conditions to announce now, in ascending order."""
        self._held_N = np.where(holds_N, self._held_N + 1, 0)
        self._clear_N = np.where(holds_N, 0, self._clear_N + 1)
        self._announced_N &= self._clear_N < self._length
        fresh_N = (self._held_N >= self._length) & ~self._announced_N
        self._announced_N |= fresh_N
        return [int(n) for n in np.flatnonzero(fresh_N)]
