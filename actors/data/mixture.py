"""The sequences of each global batch, as a pure function of (seed, mixture, step).

The result does not depend on ranks, world size or number of loaders, and any step is computed directly. A batch of B
sequences has floor(w * B) sequences of every source with weight w. The remaining sequences of the batch are assigned to
sources with a fractional part, at most one to each, so that every batch is within one sequence of its shares.

Systematic sampling selects these sources, from one number u per step: the fractions are laid out one after another on a
line, and a source gets a sequence if one of the points u, u + 1, u + 2, ... falls into its fraction. u takes every
multiple of 2^-32 once in 2^32 steps, evenly (multiples of the golden ratio). So the share of every source is exact to
2^-32 in the long run and to a few sequences at any time. The number of extra sequences of a source before a step is a
sum of floors, which a Euclidean algorithm computes in 32 iterations.

Within a source the k-th draw is the k-th element of the epoch's permutation, so every sequence occurs once per epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from moray.actors.data.batch_plan import BatchPlan
from moray.actors.data.epoch_permutation import permuted

_ONE = 1 << 32  # units per sequence
_STRIDE = 2_654_435_769  # odd, and nearest to the golden ratio times _ONE

Int64 = npt.NDArray[np.int64]


class Mixture:
    """Maps a step to the (source, sequence number) of every slot of its batch."""

    def __init__(self, sequences: Mapping[str, int], weights: Mapping[str, float], seed: int, plan: BatchPlan) -> None:
        """sequences: number of sequences of each source. weights: relative weight of each source; a source that is not
        named gets none. Without any weights, sources are weighted by their number of sequences.

        Raises ValueError for an unknown source, an invalid weight, or a weighted source without sequences.
        """
        self.sources = sorted(sequences)
        for source, weight in weights.items():
            if source not in sequences:
                raise ValueError(f"mixture: unknown source {source!r}; the sources are {', '.join(self.sources)}")
            if not 0 <= weight < math.inf:
                raise ValueError(f"mixture: the weight of {source!r} must be finite and not negative, not {weight}")
        chosen = weights or {source: float(n) for source, n in sequences.items()}
        shares = [Fraction(chosen.get(source, 0.0)) for source in self.sources]  # exact, so that they sum to 1
        if sum(shares) <= 0:
            raise ValueError("mixture: at least one weight must be positive")
        for source, share in zip(self.sources, shares, strict=True):
            if share > 0 and not sequences[source]:
                raise ValueError(f"mixture: source {source!r} has no sequences")
        self._sequences = [sequences[source] for source in self.sources]
        self._shares = tuple(share / sum(shares) for share in shares)
        self._seed = seed
        self.plan = plan
        self._before = [[0] * len(self.sources)]  # sequences of each source before each part of the plan
        for size, steps in plan.parts(plan.starts[-1])[:-1]:
            self._before.append(_sums(self._before[-1], _quota(self._shares, size).drawn(steps)))

    def counts(self, step: int) -> list[int]:
        """Sequences of each source in the batch of `step`."""
        size, within = self.plan.parts(step)[-1]
        quota = _quota(self._shares, size)
        return [after - before for before, after in zip(quota.drawn(within), quota.drawn(within + 1), strict=True)]

    def drawn(self, step: int) -> list[int]:
        """Sequences of each source in all batches before `step`."""
        parts = self.plan.parts(step)
        size, within = parts[-1]
        return _sums(self._before[len(parts) - 1], _quota(self._shares, size).drawn(within))

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> tuple[Int64, Int64]:
        """(indices into `sources`, sequence numbers) of slots [start, stop) of the global batch of `step`."""
        counts, size = np.array(self.counts(step)), self.plan.size(step)
        slots = np.arange(start, size if stop is None else stop)
        # Shuffles the sources over the slots, so that ranks see similar mixtures.
        entries = permuted(slots, size, f"{self._seed}/step {step}")
        firsts = np.cumsum(counts) - counts
        source = np.searchsorted(np.cumsum(counts), entries, side="right")
        draws = np.array(self.drawn(step))[source] + entries - firsts[source]
        return source, self._numbers(source, draws)

    def _numbers(self, source: Int64, draws: Int64) -> Int64:
        numbers = np.empty_like(draws)
        size = np.array(self._sequences)[source]
        epochs, places = draws // size, draws % size
        for index, epoch in {(int(s), int(e)) for s, e in zip(source, epochs, strict=True)}:
            chosen = (source == index) & (epochs == epoch)
            key = f"{self._seed}/{self.sources[index]}/epoch {epoch}"
            numbers[chosen] = permuted(places[chosen], self._sequences[index], key)
        return numbers


class _Quota:
    """Number of sequences of each source in the first b batches of one size."""

    def __init__(self, shares: tuple[Fraction, ...], size: int) -> None:
        # Rounds the borders between sources, so that units add up, and each is within one unit of its share.
        borders = [0, *(round(share * size * _ONE) for share in accumulate(shares))]
        units = [end - begin for begin, end in pairwise(borders)]
        self._whole = [unit // _ONE for unit in units]
        ends = [0]
        for unit in units:
            ends.append(ends[-1] + unit % _ONE)
        self._ends = ends  # ends of the fractions on the line; the last is a multiple of _ONE

    def drawn(self, batches: int) -> list[int]:
        points = [batches * (end // _ONE) + _below(end % _ONE, batches) for end in self._ends]
        extras = [after - before for before, after in pairwise(points)]
        return [batches * whole + extra for whole, extra in zip(self._whole, extras, strict=True)]


_quota = lru_cache(maxsize=1024)(_Quota)


def _sums(first: list[int], second: list[int]) -> list[int]:
    return [a + b for a, b in zip(first, second, strict=True)]


def _below(limit: int, batches: int) -> int:
    """The number of b < batches with u(b) < limit, where u(b) = b * _STRIDE mod _ONE."""
    return batches - (_floor_sum(batches, _ONE, _STRIDE, _ONE - limit) - _floor_sum(batches, _ONE, _STRIDE, 0))


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of floor((a * i + b) / m) over i in [0, n); a, b >= 0. Iterates like Euclid's algorithm for (a, m)."""
    total = 0
    while True:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        last = a * n + b
        if last < m:
            return total
        n, b = divmod(last, m)
        m, a = a, m
