"""Repeats of T words: fingerprints, of which every repeat shares at least one, and the windows of T words around them.

Winnowing (Schleimer, Wilkerson, Aiken: Winnowing, SIGMOD 2003) selects the minimum of every W consecutive hashes of
k-grams of words, and the last one of equal hashes. The selection depends only on the words in the window, so a repeat
of T = k + W - 1 words shares a fingerprint at any position, and a fraction 2 / (W + 1) of all k-grams are fingerprints.
Windows of T words are hashed, to 128 bits, only around repeated fingerprints; equal hashes are taken as equal words.
The number of rows grows with the length of the repeats, not with the number of pairs of documents.

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
    """Writes a rolling polynomial hash, modulo 2^64, of every `size` consecutive ones of the first `count` hashes.

    Returns their number. `out` may be `hashes`.
    """
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
def _last_minimum(values: Hashes, begin: int, end: int) -> int:
    """The index of the minimum of values[begin:end], the last one of equal values."""
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
    """Writes the fingerprints of all documents; returns F, their number.

    keys, rows, places: the hash, the document and the word index of each fingerprint, [F], with capacity for one per
    byte of text. words: receives the number of words of each document, int64 [N].
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
                best = _last_minimum(hashes, max(0, i - width + 1), i + 1)
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
    """Writes every window of T words that contains a fingerprint of (rows, places) [F], in that order.

    Returns their number. keys, others: two halves of each window's hash, uint64. spots: row, begin and end in
    characters, begin and end in words, int64 [., 5]. The capacity is T - k + 1 windows per fingerprint.
    """
    found, f = 0, 0
    while f < len(rows):
        n = rows[f]
        capacity = offsets[n + 1] - offsets[n]
        hashes, at = np.empty(capacity, np.uint64), np.empty((capacity, 2), np.int64)
        count = shingle(data, offsets[n], offsets[n + 1], kinds, folds, 1, False, hashes)
        word_places(data, offsets[n], offsets[n + 1], kinds, folds, at)
        other = np.empty(capacity, np.uint64)
        last = _roll(hashes, count, tokens, _OTHER_BASE, other)
        _roll(hashes, count, tokens, _BASE, hashes)
        next_start = 0
        while f < len(rows) and rows[f] == n:
            for start in range(max(next_start, places[f] + size - tokens), min(places[f] + 1, last)):
                keys[found], others[found] = hashes[start], other[start]
                spots[found, 0], spots[found, 1], spots[found, 2] = n, at[start, 0], at[start + tokens - 1, 1]
                spots[found, 3], spots[found, 4] = start, start + tokens
                found += 1
            next_start = max(next_start, places[f] + 1)
            f += 1
    return found


@numba.njit(nogil=True, cache=True)
def count_words(offsets: Places, data: Bytes, kinds: Bytes, folds: Codes) -> npt.NDArray[np.int64]:
    """The number of words of each text, int64 [N]."""
    longest = 0
    for n in range(len(offsets) - 1):
        longest = max(longest, offsets[n + 1] - offsets[n])
    places, counts = np.empty((longest, 2), np.int64), np.empty(len(offsets) - 1, np.int64)
    for n in range(len(counts)):
        counts[n] = word_places(data, offsets[n], offsets[n + 1], kinds, folds, places)
    return counts
