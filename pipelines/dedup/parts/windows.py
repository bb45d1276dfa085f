"""Repeats of T words: fingerprints of which every repeat shares one, and the windows of T words near them.

Winnowing (Schleimer, Wilkerson, Aiken: Winnowing, SIGMOD 2003): of the hashes of all k-grams of words, the least of
every W consecutive ones, of equal ones the last. What is chosen depends on the words in the window alone, so a repeat
of T = k + W - 1 words has a fingerprint in common wherever it stands, and 2 / (W + 1) of all k-grams are chosen. Only
there the windows of T words are hashed, to 128 bits, which are the same if the words are (and else, as with any hash of
that size, never). So repeats cost rows in proportion to their length, not to the pairs of documents that have them.

Shapes: N documents, F fingerprints.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.text.shingles import shingle
from moray.pipelines.text.words import Bytes, Codes, Hashes, Places, word_places

_BASE = np.uint64(0x9E3779B97F4A7C15)
_OTHER_BASE = np.uint64(0xD1342543DE82EF95)
_ZERO = np.uint64(0)


def gram_size(tokens: int) -> int:
    """k: two fifths of T, so that for T = 50 a sixteenth of all k-grams are fingerprints."""
    return max(1, tokens * 2 // 5)


@numba.njit(nogil=True, cache=True)
def _roll(hashes: Hashes, count: int, size: int, base: np.uint64, out: Hashes) -> int:
    """Writes a polynomial of every `size` consecutive hashes of `count`, modulo 2^64; how many. `out` may be them."""
    power = base  # base ** size
    for _ in range(size - 1):
        power *= base
    rolled, first = _ZERO, _ZERO
    for i in range(count):
        rolled = rolled * base + hashes[i]
        if i >= size:
            rolled -= first * power
        if i >= size - 1:
            first = hashes[i - size + 1]
            out[i - size + 1] = rolled
    return max(0, count - size + 1)


@numba.njit(nogil=True, cache=True)
def _last_least(values: Hashes, begin: int, end: int) -> int:
    best = begin
    for i in range(begin + 1, end):
        if values[i] <= values[best]:
            best = i
    return best


@numba.njit(nogil=True, cache=True)
def fingerprints(
    offsets: Places,
    data: Bytes,
    kinds: Bytes,
    folds: Codes,
    tokens: int,
    size: int,
    words: Places,
    keys: Hashes,
    rows: Places,
    places: Places,
) -> int:
    """Writes the fingerprints of all documents: keys, rows and (word) places [F], with room for one a byte; F.

    words: int64 [N], how many each document has.
    """
    longest = 0
    for n in range(len(offsets) - 1):
        longest = max(longest, offsets[n + 1] - offsets[n])
    hashes = np.empty(longest, np.uint64)
    width, found = tokens - size + 1, 0
    for n in range(len(offsets) - 1):
        words[n] = shingle(data, offsets[n], offsets[n + 1], kinds, folds, 1, False, hashes)
        grams = _roll(hashes, words[n], size, _BASE, hashes)
        best, chosen = -1, -1
        for i in range(grams):
            if best < i - width + 1 or best < 0:
                best = _last_least(hashes, max(0, i - width + 1), i + 1)
            elif hashes[i] <= hashes[best]:
                best = i
            if i >= width - 1 and best != chosen:
                chosen = best
                keys[found], rows[found], places[found] = hashes[best], n, best
                found += 1
    return found


@numba.njit(nogil=True, cache=True)
def windows(
    offsets: Places,
    data: Bytes,
    kinds: Bytes,
    folds: Codes,
    tokens: int,
    size: int,
    rows: Places,
    places: Places,
    keys: Hashes,
    others: Hashes,
    spots: Places,
) -> int:
    """Writes every window of T words that holds one of the fingerprints at (rows, places) [F], in that order; how many.

    keys, others: uint64, two halves of a hash; spots: int64 [., 5], of each window its row, where it begins and ends in
    characters, and in words. There is room for T - k + 1 windows a fingerprint.
    """
    found, f = 0, 0
    while f < len(rows):
        n = rows[f]
        room = offsets[n + 1] - offsets[n]
        hashes, at = np.empty(room, np.uint64), np.empty((room, 2), np.int64)
        count = shingle(data, offsets[n], offsets[n + 1], kinds, folds, 1, False, hashes)
        word_places(data, offsets[n], offsets[n + 1], kinds, folds, at)
        other = np.empty(room, np.uint64)
        last = _roll(hashes, count, tokens, _OTHER_BASE, other)
        _roll(hashes, count, tokens, _BASE, hashes)
        following = 0
        while f < len(rows) and rows[f] == n:
            for start in range(max(following, places[f] + size - tokens), min(places[f] + 1, last)):
                keys[found], others[found] = hashes[start], other[start]
                spots[found, 0], spots[found, 1], spots[found, 2] = n, at[start, 0], at[start + tokens - 1, 1]
                spots[found, 3], spots[found, 4] = start, start + tokens
                found += 1
            following = max(following, places[f] + 1)
            f += 1
    return found


@numba.njit(nogil=True, cache=True)
def count_words(offsets: Places, data: Bytes, kinds: Bytes, folds: Codes) -> npt.NDArray[np.int64]:
    """int64 [N]: how many words each text has."""
    longest = 0
    for n in range(len(offsets) - 1):
        longest = max(longest, offsets[n + 1] - offsets[n])
    room, counts = np.empty((longest, 2), np.int64), np.empty(len(offsets) - 1, np.int64)
    for n in range(len(counts)):
        counts[n] = word_places(data, offsets[n], offsets[n + 1], kinds, folds, room)
    return counts
