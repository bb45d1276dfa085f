"""Features of the quality model: bags of hashed words and word pairs, computed from Arrow memory. Compiled by numba.

N-grams are dedup's shingles of normalized words. The bucket of an n-gram is its hash modulo a power of two (feature
hashing, Weinberger et al. 2009, arXiv 0902.2206), so no vocabulary is stored. The feature of a bucket is its count
divided by the square root of the number of n-grams, which approximates normalization to length 1.

Shapes: N documents, B buckets.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.text.shingles import shingle

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]


@numba.njit(nogil=True)
def _longest(offsets: Places) -> int:
    longest = 0
    for n in range(len(offsets) - 1):
        longest = max(longest, offsets[n + 1] - offsets[n])
    return longest


@numba.njit(nogil=True, cache=True)
def feature_buckets(
    offsets: Places,
    data: Bytes,
    kinds: Bytes,
    folds: Codes,
    longest: int,
    count: int,
    ends: Places,
    out: npt.NDArray[np.int32],
) -> None:
    """Writes the buckets of the n-grams of up to `longest` words of all documents, document after document.

    count: the number of buckets. ends: [N], the end of each document's buckets in `out`. out: int32, with capacity for
    `longest` per byte of text. kinds, folds: dedup's character tables.
    """
    hashes = np.empty(_longest(offsets), np.uint64)
    at = 0
    for n in range(len(offsets) - 1):
        for size in range(1, longest + 1):
            found = shingle(data, offsets[n], offsets[n + 1], kinds, folds, size, False, hashes)
            for i in range(found):
                out[at + i] = hashes[i] & np.uint64(count - 1)
            at += found
        ends[n] = at


@numba.njit(nogil=True, cache=True)
def logits(
    offsets: Places,
    data: Bytes,
    kinds: Bytes,
    folds: Codes,
    longest: int,
    weights: npt.NDArray[np.float32],
    out: npt.NDArray[np.float64],
) -> None:
    """Writes the dot product of each document's features and the weights [B], float64 [N]; 0 without words."""
    hashes = np.empty(_longest(offsets), np.uint64)
    for n in range(len(offsets) - 1):
        total, number = 0.0, 0
        for size in range(1, longest + 1):
            found = shingle(data, offsets[n], offsets[n + 1], kinds, folds, size, False, hashes)
            for i in range(found):
                total += weights[hashes[i] & np.uint64(len(weights) - 1)]
            number += found
        out[n] = total / np.sqrt(number) if number else 0.0
