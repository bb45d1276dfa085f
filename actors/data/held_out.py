"""The held-out sequences that measure a model while it trains: the same ones each time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class HeldOutPlan:
    """Slots of sequences, source after source. `used` of the `stored` sequences of each source are used, evenly spaced.

    address: a folder or `s3://` address of token sets.
    """

    address: str
    sources: tuple[str, ...]
    stored: tuple[int, ...]
    used: tuple[int, ...]

    @classmethod
    def of(cls, address: str, stored: Mapping[str, int], most: int) -> HeldOutPlan:
        """At most `most` sequences of each source that has any. stored: sequences by source."""
        found = sorted((name, count) for name, count in stored.items() if count)
        names, counts = [name for name, _ in found], [count for _, count in found]
        return cls(address, tuple(names), tuple(counts), tuple(min(count, most) for count in counts))

    @property
    def slots(self) -> int:
        return sum(self.used)

    def sequences(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(index in `sources`, sequence number) of slots [start, stop)."""
        slots, ends = np.arange(start, stop), np.cumsum(self.used, dtype=np.int64)
        source = np.searchsorted(ends, slots, side="right")
        used, stored = np.array(self.used, np.int64), np.array(self.stored, np.int64)
        within = slots - (ends - used)[source]
        return source, within * stored[source] // used[source]
