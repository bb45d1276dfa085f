"""Texts as bags of hashed words and word pairs, straight from Arrow's memory; compiled by numba.

An n-gram is a shingle of dedup's: words in lower case, by Unicode. Its bucket is its hash modulo a power of two
(Weinberger et al. 2009, arXiv 0902.2206), so there is no vocabulary to keep. A text's feature is how often a bucket
comes, over the root of how many n-grams there are, which is near the length of the vector.

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
    """Writes the buckets, of `count`, of each document's n-grams of up to `longest` words, one document after
    another; ends[n]: where document n's end.

    out: int32, with room for `longest` a byte. kinds, folds: dedup's table of characters.
    """
    room = np.empty(_longest(offsets), np.uint64)
    at = 0
    for n in range(len(offsets) - 1):
        for size in range(1, longest + 1):
            found = shingle(data, offsets[n], offsets[n + 1], kinds, folds, size, False, room)
            for i in range(found):
                out[at + i] = room[i] & np.uint64(count - 1)
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
    """Writes each document's product with the weights [B], float64 [N]; 0 for one without any word."""
    room = np.empty(_longest(offsets), np.uint64)
    for n in range(len(offsets) - 1):
        total, number = 0.0, 0
        for size in range(1, longest + 1):
            found = shingle(data, offsets[n], offsets[n + 1], kinds, folds, size, False, room)
            for i in range(found):
                total += weights[room[i] & np.uint64(len(weights) - 1)]
            number += found
        out[n] = total / np.sqrt(number) if number else 0.0
