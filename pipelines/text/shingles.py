"""Shingles and MinHash band keys of texts in Arrow's memory, compiled by numba: the only pass over the text.

A shingle is `size` consecutive words (or characters, a run of other characters being one space), in lower case, as a
64-bit hash; a text that is shorter is one shingle, and one without any word has none. A document's minima are those of
`bands * rows` affine maps of its shingles' upper halves modulo 2^32, and the key of a band is a hash of its rows'
minima: two documents of Jaccard similarity s have a key in common with probability 1 - (1 - s^rows)^bands (Broder
1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4). Keys have KEY_BITS bits, because an index keeps
them for ever: of 10^9 documents, a band's keys make some 2,000 pairs by chance, which verification refuses.

Notable: numba makes float64 of uint64 and int together, so every constant of the hashes is a uint64.

Shapes: N documents, P = bands * rows minima.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.text.utf8 import mixed
from moray.pipelines.text.words import Bytes, Codes, Hashes, Places, characters_of, words

_STEP = np.uint64(0x9E3779B97F4A7C15)
_1, _32 = np.uint64(1), np.uint64(32)
KEY_BITS = 48
_UNUSED = np.uint64(64 - KEY_BITS)
_AT_ONCE = 512  # words whose shingles are made
_MANY, _PART = 128, 4096  # shingles: of so many, a minimum is taken over after another; of so many at a time


@numba.njit(nogil=True)
def shingle(
    data: Bytes, begin: int, end: int, kinds: Bytes, folds: Codes, size: int, characters: bool, out: Hashes
) -> int:
    """Writes the shingles of data[begin:end], valid UTF-8, to `out`, which has room for one a byte; how many."""
    if characters:
        count = characters_of(data, begin, end, kinds, folds, out)
    else:
        count = words(data, begin, end, kinds, folds, out)
    if not count:
        return 0
    long = min(size, count)
    total = count - long + 1
    rolled = np.empty(min(_AT_ONCE, total), np.uint64)
    for first in range(0, total, _AT_ONCE):
        length = min(_AT_ONCE, total - first)
        for i in range(length):
            rolled[i] = out[first + i]
        for k in range(1, long):
            for i in range(length):
                rolled[i] = rolled[i] * _STEP + out[first + i + k]
        for i in range(length):
            out[first + i] = mixed(rolled[i])
    return total


@numba.njit(nogil=True)
def _lower(minima: Codes, shingles: Codes, factors: Codes, terms: Codes) -> None:
    """minima[p] becomes the least that map p makes of any of the shingles, where that is less. uint32 [P] and [S]."""
    if len(shingles) < _MANY:
        for i in range(len(shingles)):
            for p in range(len(factors)):
                minima[p] = min(minima[p], np.uint32(factors[p] * shingles[i] + terms[p]))
        return
    for begin in range(0, len(shingles), _PART):  # which stay in the fastest cache
        part = shingles[begin : begin + _PART]
        for p in range(len(factors)):
            factor, term, least = factors[p], terms[p], minima[p]
            for i in range(len(part)):
                least = min(least, np.uint32(factor * part[i] + term))
            minima[p] = least


@numba.njit(nogil=True, cache=True)
def band_keys(
    offsets: Places,
    data: Bytes,
    kinds: Bytes,
    folds: Codes,
    size: int,
    characters: bool,
    factors: Codes,
    terms: Codes,
    rows: int,
    keys: Hashes,
    counts: npt.NDArray[np.int32],
) -> None:
    """Writes uint64 keys [N, bands] and int32 counts [N] of shingles, 0 for a document that has no keys.

    offsets: int64 [N + 1] into `data`, uint8. factors (odd) and terms: uint32 [P].
    """
    longest = 0
    for n in range(len(offsets) - 1):
        longest = max(longest, offsets[n + 1] - offsets[n])
    out, upper = np.empty(longest, np.uint64), np.empty(longest, np.uint32)
    minima = np.empty(len(factors), np.uint32)
    for n in range(len(offsets) - 1):
        count = shingle(data, offsets[n], offsets[n + 1], kinds, folds, size, characters, out)
        counts[n] = count
        minima[:] = 0xFFFFFFFF
        for i in range(count):
            upper[i] = out[i] >> _32
        _lower(minima, upper[:count], factors, terms)
        for band in range(keys.shape[1]):
            key = np.uint64(band) * _STEP
            for row in range(rows):
                key = mixed(key ^ np.uint64(minima[band * rows + row])) + _STEP
            keys[n, band] = key >> _UNUSED


@numba.njit(nogil=True, cache=True)
def shingles_of(
    offsets: Places, data: Bytes, kinds: Bytes, folds: Codes, size: int, characters: bool, ends: Places, out: Hashes
) -> None:
    """Writes each document's shingles, one after another, to `out`; ends[n]: where document n's do.

    out: uint64, with room for a shingle a byte.
    """
    total = 0
    for n in range(len(offsets) - 1):
        total += shingle(data, offsets[n], offsets[n + 1], kinds, folds, size, characters, out[total:])
        ends[n] = total


@numba.njit(nogil=True, cache=True)
def ascend(bounds: Places, shingles: Hashes) -> None:
    """Sorts the shingles from each of `bounds` [N + 1] to the next, in place.

    Hashes fall evenly: by their upper bits into places for two or so each, then each passes those of its own place that
    are greater. A third of the time of numpy's sort, which cannot know that.
    """
    longest = 1
    for n in range(len(bounds) - 1):
        longest = max(longest, bounds[n + 1] - bounds[n])
    room, starts = np.empty(longest, np.uint64), np.empty(2 * longest + 2, np.int64)
    for n in range(len(bounds) - 1):
        own = shingles[bounds[n] : bounds[n + 1]]
        bits = 1
        while 2 << bits < len(own):
            bits += 1
        shift = np.uint64(64 - bits)
        starts[: (1 << bits) + 1] = 0
        for value in own:
            starts[(value >> shift) + _1] += 1
        for place in range(1 << bits):
            starts[place + 1] += starts[place]
        for value in own:
            room[starts[value >> shift]] = value
            starts[value >> shift] += 1
        for i in range(len(own)):
            value, at = room[i], i
            while at and own[at - 1] > value:
                own[at] = own[at - 1]
                at -= 1
            own[at] = value


@numba.njit(nogil=True, cache=True)
def distinct(bounds: Places, shingles: Hashes) -> None:
    """Of shingles that ascend from each of `bounds` [N + 1] to the next, leaves each document's distinct ones, one
    document after another, in place, and makes the bounds theirs."""
    total = begin = 0
    for n in range(len(bounds) - 1):
        end = bounds[n + 1]
        first, last = total, np.uint64(0)
        for i in range(begin, end):  # nothing to foresee: a write each, of which the next may be in its place
            now = shingles[i]
            total += (now != last) | (total == first)
            shingles[total - 1] = last = now
        bounds[n + 1], begin = total, end


@numba.njit(nogil=True, cache=True)
def in_common(one: Hashes, other: Hashes) -> int:
    """How many numbers two ascending arrays of distinct numbers share."""
    i, j, common = 0, 0, 0
    while i < len(one) and j < len(other):  # as many steps whatever they hold, and no jump to foresee
        a, b = one[i], other[j]
        common += a == b
        i += a <= b
        j += b <= a
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
