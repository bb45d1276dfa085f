"""Which sequences make up a global batch: a pure function of (seed, mixture, step).

No rank, no world size, no number of loaders enters. Sources take turns in a fixed cycle in which each has its share
of slots, spread evenly, so every batch holds each source's share to within one or two sequences. Within a source the
k-th draw is the k-th entry of that epoch's permutation: every sequence exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

CYCLE = 4096  # slots; shares are rounded to 1/4096


class Mixture:
    """Maps a slot (position in the endless stream of sequences) to (source, sequence number)."""

    def __init__(self, sequences: Mapping[str, int], weights: Mapping[str, float], seed: int) -> None:
        """`sequences`: how many each source has. `weights`: relative; a source left out weighs what it holds.

        Raises ValueError for an unknown source, a weight that is not positive, or a source without sequences.
        """
        self.sources = sorted(sequences)
        for source, weight in weights.items():
            if source not in sequences:
                raise ValueError(f"mixture names {source!r}; the sources are {', '.join(self.sources)}")
            if weight < 0:
                raise ValueError(f"mixture: the weight of {source!r} is {weight}, it must not be negative")
        chosen = weights or {source: float(n) for source, n in sequences.items()}
        shares = np.array([chosen.get(source, 0.0) for source in self.sources])
        if shares.sum() <= 0:
            raise ValueError("mixture: at least one weight must be positive")
        for source, share in zip(self.sources, shares, strict=True):
            if share > 0 and not sequences[source]:
                raise ValueError(f"mixture: source {source!r} has no sequences")
        self._sequences = [sequences[source] for source in self.sources]
        self._seed = seed
        self._slots = _largest_remainder(shares / shares.sum(), CYCLE)
        self._cycle, self._rank = _spread(self._slots)

    def slot(self, position: int) -> tuple[int, int]:
        """(index into `sources`, sequence number) of one slot; O(1) but for the epoch's permutation, kept cached."""
        turn, within = divmod(position, CYCLE)
        source = int(self._cycle[within])
        draw = turn * int(self._slots[source]) + int(self._rank[within])
        epoch, k = divmod(draw, self._sequences[source])
        return source, int(_permutation(self._sequences[source], self._seed, source, epoch)[k])

    def batch(self, step: int, size: int, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """Slots [start, stop) of the global batch of `step`, which has `size` sequences."""
        return [self.slot(step * size + i) for i in range(start, size if stop is None else stop)]


def _largest_remainder(shares: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Integers that sum to `total`, as near to shares * total as can be; a positive share gets at least one."""
    exact = shares * total
    slots = np.floor(exact).astype(np.int64)
    slots[(shares > 0) & (slots == 0)] = 1
    while slots.sum() != total:
        step = 1 if slots.sum() < total else -1
        room = np.where(slots > 1, exact - slots, np.inf) if step < 0 else exact - slots
        slots[np.argmax(room) if step > 0 else np.argmin(room)] += step
    return slots


def _spread(slots: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The cycle: which source each slot belongs to, and which of that source's slots it is."""
    source = np.repeat(np.arange(len(slots)), slots)
    rank = np.concatenate([np.arange(n) for n in slots])
    place = (rank + 0.5) / slots[source]
    order = np.lexsort((source, place))
    return source[order], rank[order]


@lru_cache(maxsize=64)
def _permutation(n: int, seed: int, source: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, (source << 32) + epoch])).permutation(n)
