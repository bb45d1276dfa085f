"""Hashes of n-grams, and the lookup of a corpus's n-grams among those of evals. Compiled by numba.

Units (words or characters) and their hashes are those of dedup's kernel (a shingle of one unit). The hash of an n-gram
is a rolling polynomial of its units' hashes modulo 2^64 (Karp, Rabin 1987), so 50 characters cost no more than 13
words. A bitmap rejects nearly all n-grams that no eval contains; the others are looked up in the sorted hashes. A match
by hash is verified in eval_index.py.

Shapes: N texts, G distinct n-grams.
"""

from __future__ import annotations

import numba
import numpy as np

from moray.pipelines.text.shingles import shingle
from moray.pipelines.text.words import Bytes, Codes, Hashes, Places

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xD1342543DE82EF95)
_ZERO, _ONE, _THREE, _SEVEN = np.uint64(0), np.uint64(1), np.uint64(3), np.uint64(7)
_BITS_PER_GRAM = 32


@numba.njit(nogil=True, cache=True)
def _rolled(units: Hashes, count: int, size: int, out: Hashes) -> int:
    """Writes the hash of every n-gram of `size` units among the first `count`. Returns their number."""
    if count < size:
        return 0
    power, value = _ONE, _ZERO
    for k in range(size):
        value = value * _FACTOR + units[k]
        if k:
            power = power * _FACTOR
    out[0] = value
    for i in range(1, count - size + 1):
        value = (value - units[i - 1] * power) * _FACTOR + units[i + size - 1]
        out[i] = value
    return count - size + 1


@numba.njit(nogil=True, cache=True)
def hashes_of(
    offsets: Places, data: Bytes, kinds: Bytes, folds: Codes, characters: bool, sizes: Places, out: Hashes
) -> int:
    """Writes the hashes of the n-grams of all texts, text after text. Returns their number.

    sizes: units per n-gram of each text, 0 for none, [N]. out: uint64, with capacity for one per byte of text.
    """
    total = 0
    units = np.empty(_longest(offsets), np.uint64)
    for n in range(len(offsets) - 1):
        if not sizes[n]:
            continue
        count = shingle(data, offsets[n], offsets[n + 1], kinds, folds, 1, characters, units)
        total += _rolled(units, count, sizes[n], out[total:])
    return total


def bitmap(grams: Hashes) -> tuple[Bytes, np.uint64]:
    """A bitmap of the hashes, with at least 32 bits per hash, and the shift that maps a mixed hash to its bit."""
    power = max(10, int(len(grams) * _BITS_PER_GRAM).bit_length())
    shift = np.uint64(64 - power)
    bits = np.zeros(1 << power, bool)
    bits[(grams * _MIX) >> shift] = True
    return np.packbits(bits, bitorder="little"), shift


@numba.njit(nogil=True, cache=True)
def scan(
    offsets: Places,
    data: Bytes,
    kinds: Bytes,
    folds: Codes,
    characters: bool,
    sizes: Places,
    grams: Hashes,
    bits: Bytes,
    shift: np.uint64,
    found: Places,
) -> int:
    """Writes (text, index in `grams`, first unit) to `found`, int64 [capacity, 3], once per text and n-gram.

    Returns the number of matches, which may exceed the capacity. sizes: the distinct sizes of n-grams. grams: uint64
    [G], ascending.
    """
    total = 0
    units, rolled = np.empty(_longest(offsets), np.uint64), np.empty(_longest(offsets), np.uint64)
    seen = np.full(len(grams), -1)
    for n in range(len(offsets) - 1):
        count = shingle(data, offsets[n], offsets[n + 1], kinds, folds, 1, characters, units)
        for s in range(len(sizes)):
            for i in range(_rolled(units, count, sizes[s], rolled)):
                bit = (rolled[i] * _MIX) >> shift
                if not (bits[bit >> _THREE] >> (bit & _SEVEN)) & 1:
                    continue
                gram = np.searchsorted(grams, rolled[i])
                if gram == len(grams) or grams[gram] != rolled[i] or seen[gram] == n:
                    continue
                seen[gram] = n
                if total < len(found):
                    found[total, 0], found[total, 1], found[total, 2] = n, gram, i
                total += 1
    return total


@numba.njit(nogil=True, cache=True)
def _longest(offsets: Places) -> int:
    longest = 0
    for n in range(len(offsets) - 1):
        longest = max(longest, offsets[n + 1] - offsets[n])
    return longest
