"""Shingles and MinHash band keys of texts in Arrow's memory, compiled by numba: the only pass over the text.

A shingle is `size` consecutive words (or characters, a run of other characters being one space), in lower case, as a
64-bit hash; a text that is shorter is one shingle, and one without any word has none. A document's minima are those of
`bands * rows` affine maps of its shingles' upper halves modulo 2^32, and the key of a band is a hash of its rows'
minima: two documents of Jaccard similarity s have a key in common with probability 1 - (1 - s^rows)^bands (Broder
1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4). Keys have KEY_BITS bits, because an index keeps
them for ever: of 10^10 documents, a band's keys make some 3,000 pairs by chance, which verification refuses.

Notable: numba makes float64 of uint64 and int together, so every constant of the hashes is a uint64.

Shapes: N documents, P = bands * rows minima.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.dedup.characters import ALONE, BETWEEN, SIZE, WORD
from moray.pipelines.text.utf8 import decoded, mixed

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

_FIRST = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_32 = np.uint64(32)
_SPACE = np.uint64(32)
KEY_BITS = 54
_UNUSED = np.uint64(64 - KEY_BITS)
_LAST = 0x40000  # code points from SIZE up to here are ideographs


@numba.njit(nogil=True, cache=True, inline="always")
def _character(data: Bytes, at: int, kinds: Bytes, lowers: Codes) -> tuple[int, int, int]:
    """(kind, code point in lower case, where the next one is)."""
    code, following = decoded(data, at)
    if code < SIZE:
        return int(kinds[code]), int(lowers[code]), following
    return (ALONE if code < _LAST else BETWEEN), code, following


@numba.njit(nogil=True, cache=True)
def _words(data: Bytes, begin: int, end: int, kinds: Bytes, lowers: Codes, out: Hashes) -> int:
    """Writes a hash for each word of data[begin:end]; how many."""
    count, at = 0, begin
    word, inside = _FIRST, False
    while at < end:
        kind, code, at = _character(data, at, kinds, lowers)
        if kind == WORD:
            word, inside = (word ^ np.uint64(code)) * _PRIME, True
            continue
        if inside:
            out[count] = mixed(word)
            count += 1
            word, inside = _FIRST, False
        if kind == ALONE:
            out[count] = mixed((_FIRST ^ np.uint64(code)) * _PRIME)
            count += 1
    if inside:
        out[count] = mixed(word)
        count += 1
    return count


@numba.njit(nogil=True, cache=True)
def _characters(data: Bytes, begin: int, end: int, kinds: Bytes, lowers: Codes, out: Hashes) -> int:
    """The same for each character of words, and for what lies between two of them."""
    count, at, between = 0, begin, False
    while at < end:
        kind, code, at = _character(data, at, kinds, lowers)
        if kind == BETWEEN:
            between = count > 0
            continue
        if between:
            out[count] = mixed((_FIRST ^ _SPACE) * _PRIME)
            count += 1
            between = False
        out[count] = mixed((_FIRST ^ np.uint64(code)) * _PRIME)
        count += 1
    return count


@numba.njit(nogil=True, cache=True)
def shingle(
    data: Bytes, begin: int, end: int, kinds: Bytes, lowers: Codes, size: int, characters: bool, out: Hashes
) -> int:
    """Writes the shingles of data[begin:end], valid UTF-8, to `out`, which has room for one a byte; how many."""
    if characters:
        count = _characters(data, begin, end, kinds, lowers, out)
    else:
        count = _words(data, begin, end, kinds, lowers, out)
    if not count:
        return 0
    long = min(size, count)
    for i in range(count - long + 1):
        rolled = out[i]
        for k in range(1, long):
            rolled = rolled * _STEP + out[i + k]
        out[i] = mixed(rolled)
    return count - long + 1


@numba.njit(nogil=True, cache=True)
def band_keys(
    offsets: Places, data: Bytes, kinds: Bytes, lowers: Codes, size: int, characters: bool, factors: Codes,
    terms: Codes, rows: int, keys: Hashes, counts: npt.NDArray[np.int32],
) -> None:  # fmt: skip
    """Writes uint64 keys [N, bands] and int32 counts [N] of shingles, 0 for a document that has no keys.

    offsets: int64 [N + 1] into `data`, uint8. factors (odd) and terms: uint32 [P].
    """
    longest = 0
    for n in range(len(offsets) - 1):
        longest = max(longest, offsets[n + 1] - offsets[n])
    out = np.empty(longest, np.uint64)
    minima = np.empty(len(factors), np.uint32)
    for n in range(len(offsets) - 1):
        count = shingle(data, offsets[n], offsets[n + 1], kinds, lowers, size, characters, out)
        counts[n] = count
        minima[:] = 0xFFFFFFFF
        for i in range(count):
            x = np.uint32(out[i] >> _32)
            for p in range(len(factors)):
                value = np.uint32(factors[p] * x + terms[p])
                minima[p] = min(minima[p], value)
        for band in range(keys.shape[1]):
            key = np.uint64(band) * _STEP
            for row in range(rows):
                key = mixed(key ^ np.uint64(minima[band * rows + row])) + _STEP
            keys[n, band] = key >> _UNUSED


@numba.njit(nogil=True, cache=True)
def shingle_sets(
    offsets: Places, data: Bytes, kinds: Bytes, lowers: Codes, size: int, characters: bool, ends: Places, out: Hashes
) -> None:
    """Writes each document's distinct shingles, ascending, one after another to `out`; ends[n]: where document n's do.

    out: uint64, with room for a shingle a byte.
    """
    total = 0
    for n in range(len(offsets) - 1):
        count = shingle(data, offsets[n], offsets[n + 1], kinds, lowers, size, characters, out[total:])
        found = np.sort(out[total : total + count])
        for i in range(count):
            if i == 0 or found[i] != found[i - 1]:
                out[total] = found[i]
                total += 1
        ends[n] = total


@numba.njit(nogil=True, cache=True)
def in_common(one: Hashes, other: Hashes) -> int:
    """How many numbers two ascending arrays of distinct numbers share."""
    i, j, common = 0, 0, 0
    while i < len(one) and j < len(other):
        if one[i] == other[j]:
            common += 1
            i += 1
            j += 1
        elif one[i] < other[j]:
            i += 1
        else:
            j += 1
    return common


@numba.njit(nogil=True, cache=True)
def similarities(pairs: Places, bounds: Places, sets: Hashes, containment: bool) -> npt.NDArray[np.float64]:
    """float64 [E]: Jaccard similarity of each pair of documents, document n's shingles being
    sets[bounds[n, 0] : bounds[n, 1]]; or |A and B| over the smaller's size."""
    found = np.empty(len(pairs), np.float64)
    for e in range(len(pairs)):
        one = sets[bounds[pairs[e, 0], 0] : bounds[pairs[e, 0], 1]]
        other = sets[bounds[pairs[e, 1], 0] : bounds[pairs[e, 1], 1]]
        common = in_common(one, other)
        whole = min(len(one), len(other)) if containment else len(one) + len(other) - common
        found[e] = common / whole if whole else 0.0
    return found


@numba.njit(nogil=True, cache=True)
def word_places(data: Bytes, begin: int, end: int, kinds: Bytes, lowers: Codes, places: Places) -> int:
    """Writes where each word of data[begin:end] begins and ends, in characters from its begin; how many there are.

    places: int64 [room for one a byte, 2].
    """
    count, at, character, inside = 0, begin, 0, False
    while at < end:
        kind, _, at = _character(data, at, kinds, lowers)
        if kind == WORD and not inside:
            places[count, 0], inside = character, True
        elif kind != WORD and inside:
            places[count, 1], inside = character, False
            count += 1
        if kind == ALONE:
            places[count, 0], places[count, 1] = character, character + 1
            count += 1
        character += 1
    if inside:
        places[count, 1] = character
        count += 1
    return count
