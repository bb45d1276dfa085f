"""MinHash signatures of documents: band keys for all documents, and the shingle sets of candidates.

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
    """MinHash parameters. A shingle is `size` words or characters. A signature has `bands` bands of `rows` hashes each,
    with hash functions drawn by `seed`.

    With the same 112 hashes, 16 bands of 7 rows find 0.98 of the pairs of similarity 0.8, and the common 14 bands of 8
    rows find 0.92. This costs a seventh more band keys and an eighth more candidates, which are verified.
    """

    size: int = 5
    characters: bool = False
    bands: int = 16
    rows: int = 7
    seed: int = 1

    @staticmethod
    def for_threshold(threshold: float, hashes: int) -> tuple[int, int]:
        """(bands, rows) with at most `hashes` hashes whose S-curve best separates pairs at a similarity threshold.

        Minimizes the area of false positives below the threshold plus twice the area of false negatives above it:
        verification removes false positives, but cannot recover false negatives.
        """
        steps = np.linspace(0, 1, 201)
        below = steps < threshold

        def error(rows: int) -> float:
            curve = 1 - (1 - steps**rows) ** (hashes // rows)
            return float(curve[below].sum() + 2 * (1 - curve[~below]).sum())

        rows = min(range(1, hashes + 1), key=error)
        return hashes // rows, rows

    def chance(self, similarity: float) -> float:
        """Probability that two documents of this Jaccard similarity share a band key."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)

    def keys(self, texts: pa.ChunkedArray) -> tuple[Keys, Integers]:
        """Band keys [N, bands], and the number of shingles of each document. Keys without shingles are meaningless."""
        from moray.pipelines.text.shingles import band_keys

        offsets, data = text_buffers(texts)
        count = len(offsets) - 1
        keys, counts = np.empty((count, self.bands), np.uint64), np.empty(count, np.int32)
        generator = np.random.default_rng(self.seed)
        maps = generator.integers(0, 1 << 32, (2, self.bands * self.rows), dtype=np.uint32)
        band_keys(offsets, data, *tables(), self.size, self.characters, maps[0] | 1, maps[1], self.rows, keys, counts)
        return keys, counts.astype(np.int64)

    def sets(self, texts: pa.ChunkedArray) -> tuple[Keys, Integers]:
        """The distinct shingles of all documents, concatenated and sorted within each document, and their offsets,
        [N + 1]."""
        from moray.pipelines.text.shingles import distinct, shingles_of, sort_shingles

        offsets, data = text_buffers(texts)
        count = len(offsets) - 1
        buffer = np.empty(int(offsets[-1] - offsets[0]), np.uint64)
        bounds = np.zeros(count + 1, np.int64)
        shingles_of(offsets, data, *tables(), self.size, self.characters, bounds[1:], buffer)
        sort_shingles(bounds, buffer)
        distinct(bounds, buffer)
        return buffer[: bounds[-1]], bounds
