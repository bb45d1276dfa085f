"""What dedup keeps of a document instead of its text: hash, length and band keys; and the shingles of a few.

Shapes: N documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.shared.arrays import Keys
from moray.pipelines.text.arrow import text_buffers
from moray.pipelines.text.characters import tables

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shingling:
    """size words, or characters, are a shingle; `bands` keys of `rows` minima each, of maps drawn by `seed`.

    Of the same 112 minima, 16 keys of 7 find what 14 of 8, which others use, miss: 0.98 for 0.92 of the pairs of
    similarity 0.8, for a seventh more keys and an eighth more candidates, which are verified."""

    size: int = 5
    characters: bool = False
    bands: int = 16
    rows: int = 7
    seed: int = 1

    @staticmethod
    def for_threshold(least: float, minima: int) -> tuple[int, int]:
        """(bands, rows), of at most so many minima, that separate best at a similarity: of all, those whose curve has
        the least area on the wrong side of it, above it counted twice, because verification refuses what is below."""
        steps = np.linspace(0, 1, 201)
        below = steps < least

        def wrong(rows: int) -> float:
            curve = 1 - (1 - steps**rows) ** (minima // rows)
            return float(curve[below].sum() + 2 * (1 - curve[~below]).sum())

        rows = min(range(1, minima + 1), key=wrong)
        return minima // rows, rows

    def chance(self, similarity: float) -> float:
        """That two documents of this Jaccard similarity share a key."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)

    def keys(self, texts: pa.ChunkedArray) -> tuple[Keys, Integers]:
        """Band keys [N, bands], and how many shingles each document has: where none, its keys mean nothing."""
        from moray.pipelines.text.shingles import band_keys

        offsets, data = text_buffers(texts)
        count = len(offsets) - 1
        keys, counts = np.empty((count, self.bands), np.uint64), np.empty(count, np.int32)
        generator = np.random.default_rng(self.seed)
        maps = generator.integers(0, 1 << 32, (2, self.bands * self.rows), dtype=np.uint32)
        band_keys(offsets, data, *tables(), self.size, self.characters, maps[0] | 1, maps[1], self.rows, keys, counts)
        return keys, counts.astype(np.int64)

    def sets(self, texts: pa.ChunkedArray) -> tuple[Keys, Integers]:
        """The distinct shingles of all documents, ascending in each, one after another; and where each one's begin,
        with the end of the last: [N + 1]."""
        from moray.pipelines.text.shingles import ascend, distinct, shingles_of

        offsets, data = text_buffers(texts)
        count = len(offsets) - 1
        room = np.empty(int(offsets[-1] - offsets[0]), np.uint64)
        bounds = np.zeros(count + 1, np.int64)
        shingles_of(offsets, data, *tables(), self.size, self.characters, bounds[1:], room)
        ascend(bounds, room)
        distinct(bounds, room)
        return room[: bounds[-1]], bounds
