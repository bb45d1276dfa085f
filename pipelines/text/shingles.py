"""Shingles and MinHash band keys of texts in Arrow's buffers, computed by numba kernels in a single pass over the text.

A shingle is the 64-bit hash of `size` consecutive words (or characters, where a run of other characters counts as one
space), in lower case. A shorter text is one shingle, and a text without words has none. The signature of a document
holds the minima of `bands * rows` affine maps of its shingles' upper halves modulo 2^32. The key of a band is a hash of
the minima of its rows. Two documents of Jaccard similarity s share a band key with probability 1 - (1 - s^rows)^bands
(Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4). Keys have KEY_BITS bits, because an index
stores them permanently. Among 10^9 documents, about 2,000 pairs share a key of a band by chance; verification rejects
them.

Notable: numba promotes uint64 combined with int to float64, so every constant of the hashes is a uint64.

Shapes: N documents, P = bands * rows hashes.
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
_BLOCK = 512  # words whose shingles are computed at once
_MANY, _PART = 128, 4096  # from _MANY shingles on, minima are computed map by map, over parts of _PART shingles


@numba.njit(nogil=True)
def shingle(
    data: Bytes, begin: int, end: int, kinds: Bytes, folds: Codes, size: int, characters: bool, out: Hashes
) -> int:
    """Writes the shingles of data[begin:end], valid UTF-8, to `out`, one element per byte. Returns their number."""
    if characters:
        count = characters_of(data, begin, end, kinds, folds, out)
    else:
        count = words(data, begin, end, kinds, folds, out)
    if not count:
        return 0
    long = min(size, count)
    total = count - long + 1
    rolled = np.empty(min(_BLOCK, total), np.uint64)
    for first in range(0, total, _BLOCK):
        length = min(_BLOCK, total - first)
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
    """Lowers minima[p] to the minimum of map p over the shingles. minima: uint32 [P], shingles: uint32 [S]."""
    if len(shingles) < _MANY:
        for i in range(len(shingles)):
            for p in range(len(factors)):
                minima[p] = min(minima[p], np.uint32(factors[p] * shingles[i] + terms[p]))
        return
    for begin in range(0, len(shingles), _PART):  # a part fits in the L1 cache
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
    """Writes uint64 band keys [N, bands] and int32 numbers of shingles [N], which are 0 for a document without keys.

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
    """Writes the shingles of all documents, concatenated, to `out`, and the end of document n's to ends[n].

    out: uint64, with one element per byte of text.
    """
    total = 0
    for n in range(len(offsets) - 1):
        total += shingle(data, offsets[n], offsets[n + 1], kinds, folds, size, characters, out[total:])
        ends[n] = total


@numba.njit(nogil=True, cache=True)
def sort_shingles(bounds: Places, shingles: Hashes) -> None:
    """Sorts the shingles of each document, from one of `bounds` [N + 1] to the next, in place.

    Hashes are uniformly distributed, so a bucket sort by their upper bits with about two hashes per bucket, followed by
    an insertion sort, takes a third of the time of numpy's sort.
    """
    longest = 1
    for n in range(len(bounds) - 1):
        longest = max(longest, bounds[n + 1] - bounds[n])
    buffer, starts = np.empty(longest, np.uint64), np.empty(2 * longest + 2, np.int64)
    for n in range(len(bounds) - 1):
        own = shingles[bounds[n] : bounds[n + 1]]
        bits = 1
        while 2 << bits < len(own):
            bits += 1
        shift = np.uint64(64 - bits)
        starts[: (1 << bits) + 1] = 0
        for value in own:
            starts[(value >> shift) + _1] += 1
        for bucket in range(1 << bits):
            starts[bucket + 1] += starts[bucket]
        for value in own:
            buffer[starts[value >> shift]] = value
            starts[value >> shift] += 1
        for i in range(len(own)):
            value, at = buffer[i], i
            while at and own[at - 1] > value:
                own[at] = own[at - 1]
                at -= 1
            own[at] = value


@numba.njit(nogil=True, cache=True)
def distinct(bounds: Places, shingles: Hashes) -> None:
    """Removes repeated shingles of each document in place, and updates `bounds` [N + 1].

    The shingles of each document must be sorted.
    """
    total = begin = 0
    for n in range(len(bounds) - 1):
        end = bounds[n + 1]
        first, last = total, np.uint64(0)
        for i in range(begin, end):  # branchless: writes every value, and the next one may overwrite it
            now = shingles[i]
            total += (now != last) | (total == first)
            shingles[total - 1] = last = now
        bounds[n + 1], begin = total, end


@numba.njit(nogil=True, cache=True)
def in_common(one: Hashes, other: Hashes) -> int:
    """Number of common elements of two sorted arrays of distinct numbers."""
    i, j, common = 0, 0, 0
    while i < len(one) and j < len(other):  # branchless steps
        a, b = one[i], other[j]
        common += a == b
        i += a <= b
        j += b <= a
    return common


@numba.njit(nogil=True, cache=True)
def similarities(pairs: Places, bounds: Places, sets: Hashes, containment: bool) -> npt.NDArray[np.float64]:
    """Jaccard similarity of each pair of documents, float64 [E]; with `containment`, |A and B| / min(|A|, |B|).

    The shingles of document n are sets[bounds[n, 0] : bounds[n, 1]].
    """
    found = np.empty(len(pairs), np.float64)
    for e in range(len(pairs)):
        one = sets[bounds[pairs[e, 0], 0] : bounds[pairs[e, 0], 1]]
        other = sets[bounds[pairs[e, 1], 0] : bounds[pairs[e, 1], 1]]
        common = in_common(one, other)
        whole = min(len(one), len(other)) if containment else len(one) + len(other) - common
        found[e] = common / whole if whole else 0.0
    return found
