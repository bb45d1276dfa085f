"""The document layout that the rules read: characters, their classes and words; and a hash table to count duplicates.

Words are separated by white space. Texts are compared by 64-bit hashes. Compiled by numba.

Shapes: C characters and W words of a document.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from moray.pipelines.filter.character_kinds import BREAK, SIZE, SPACE
from moray.pipelines.text.utf8 import decoded, mixed

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.float64]

_FIRST, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_STEP = np.uint64(0x9E3779B97F4A7C15)
ZERO: Any = np.int64(0)  # with a literal 0, numba would compile each called function a second time
NONE = -1  # no rule is broken
EMPTY = -2  # no text is left
NEWLINE, RETURN = 10, 13


class DocumentLayout(NamedTuple):
    """One document. codes: code points [C]. bits: character classes [C]. begins, ends, words: of words, with their
    hashes [W]."""

    codes: Codes
    bits: Bytes
    begins: Places
    ends: Places
    words: Hashes


class Counts(NamedTuple):
    """A hash table that counts keys. Incrementing `clock[0]` empties it.

    keys: the key of each slot. times: the clock at which the slot was set (upper 32 bits) and the count (lower 32).
    slots, places: the slot and the first place of each of the `clock[1]` distinct keys, in order of first occurrence.
    """

    keys: Hashes
    times: Places
    slots: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]
    clock: Places


def counts_for(items: int) -> Counts:
    """A table for up to `items` distinct keys."""
    slots = 1 << max(4, int(2 * items).bit_length())
    return Counts(
        np.zeros(slots, np.uint64),
        np.zeros(slots, np.int64),
        np.zeros(items + 1, np.int32),
        np.zeros(items + 1, np.int32),
        np.zeros(2, np.int64),
    )


@numba.njit(nogil=True)
def empty_table(counts: Counts, items: int) -> int:
    """Empties the table and returns the bit mask for `count_key`. Few items use few slots, which stay in cache."""
    counts.clock[0] += 1
    counts.clock[1] = 0
    slots = 16
    while slots < 2 * items:
        slots *= 2
    return slots - 1


@numba.njit(nogil=True)
def count_key(counts: Counts, mask: int, key: np.uint64, place: int) -> int:
    """Counts a key. Returns the number of earlier occurrences."""
    now = counts.clock[0]
    slot = np.int64(key & np.uint64(mask))
    while counts.times[slot] >> 32 == now:
        if counts.keys[slot] == key:
            counts.times[slot] += 1
            return (counts.times[slot] & 0xFFFFFFFF) - 1
        slot = (slot + 1) & mask
    counts.keys[slot] = key
    counts.times[slot] = now << 32 | 1
    counts.slots[counts.clock[1]] = slot
    counts.places[counts.clock[1]] = place
    counts.clock[1] += 1
    return 0


@numba.njit(nogil=True)
def most_counted(counts: Counts) -> tuple[int, int]:
    """(first place, count) of the most frequent key, the first one of equally frequent keys. Requires a key."""
    best = most = 0
    for i in range(counts.clock[1]):
        times = counts.times[counts.slots[i]] & 0xFFFFFFFF
        if times > most:
            best, most = i, times
    return counts.places[best], most


@numba.njit(nogil=True)
def hash_of(codes: Codes, begin: int, end: int) -> np.uint64:
    """The hash of the characters [begin, end)."""
    found = _FIRST
    for i in range(begin, end):
        found = (found ^ np.uint64(codes[i])) * _PRIME
    return mixed(found)


@numba.njit(nogil=True)
def hash_of_words(words: Hashes, begin: int, count: int) -> np.uint64:
    """The hash of `count` words, from their hashes."""
    found = words[begin]
    for i in range(begin + 1, begin + count):
        found = found * _STEP + words[i]
    return mixed(found)


@numba.njit(nogil=True)
def decode_layout(data: Bytes, begin: int, end: int, table: Bytes, codes: Codes, bits: Bytes) -> int:
    """Writes the characters of data[begin:end], valid UTF-8, and their classes. Returns their number."""
    count, at = 0, begin
    while at < end:
        code, at = decoded(data, at)
        codes[count] = code
        bits[count] = table[code] if code < SIZE else 0
        count += 1
    return count


@numba.njit(nogil=True)
def find_words(codes: Codes, bits: Bytes, count: int, begins: Places, ends: Places, words: Hashes) -> int:
    """Writes the bounds and the hashes of the words in the first `count` characters. Returns their number."""
    found = at = ZERO
    while at < count:
        if bits[at] & SPACE:
            at += 1
            continue
        begins[found] = at
        word = _FIRST
        while at < count and not bits[at] & SPACE:
            word = (word ^ np.uint64(codes[at])) * _PRIME
            at += 1
        ends[found] = at
        words[found] = mixed(word)
        found += 1
    return found


@numba.njit(nogil=True)
def encode(codes: Codes, count: int, out: Bytes, at: int) -> int:
    """Writes characters as UTF-8 from out[at] on. Returns their end."""
    for i in range(count):
        code = codes[i]
        if code < 0x80:
            out[at] = code
            at += 1
        elif code < 0x800:
            out[at], out[at + 1] = 0xC0 | code >> 6, 0x80 | code & 0x3F
            at += 2
        elif code < 0x10000:
            out[at], out[at + 1], out[at + 2] = 0xE0 | code >> 12, 0x80 | code >> 6 & 0x3F, 0x80 | code & 0x3F
            at += 3
        else:
            out[at], out[at + 1] = 0xF0 | code >> 18, 0x80 | code >> 12 & 0x3F
            out[at + 2], out[at + 3] = 0x80 | code >> 6 & 0x3F, 0x80 | code & 0x3F
            at += 4
    return at


@numba.njit(nogil=True)
def line_end(codes: Codes, bits: Bytes, begin: int) -> tuple[int, int]:
    """(end of the line that begins at `begin`, begin of the next line), as `str.splitlines` splits."""
    end = begin
    while end < len(codes) and not bits[end] & BREAK:
        end += 1
    if end + 1 < len(codes) and codes[end] == RETURN and codes[end + 1] == NEWLINE:
        return end, end + 2
    return end, end + 1


@numba.njit(nogil=True)
def stripped(bits: Bytes, begin: int, end: int) -> tuple[int, int]:
    """[begin, end) without leading and trailing white space."""
    while begin < end and bits[begin] & SPACE:
        begin += 1
    while end > begin and bits[end - 1] & SPACE:
        end -= 1
    return begin, end


@numba.njit(nogil=True)
def ends_in_ellipsis(codes: Codes, begin: int, end: int) -> bool:
    if end > begin and codes[end - 1] == 0x2026:
        return True
    return end - begin >= 3 and codes[end - 1] == 46 and codes[end - 2] == 46 and codes[end - 3] == 46


@numba.njit(nogil=True)
def count_symbols(codes: Codes) -> tuple[int, int]:
    """(number of '#', number of ellipses). Ellipses are '...', not overlapping, and the ellipsis character."""
    hashes = ellipses = dots = 0
    for code in codes:
        dots = dots + 1 if code == 46 else 0
        hashes += code == 35
        if dots == 3:
            ellipses += 1
            dots = 0
        ellipses += code == 0x2026
    return hashes, ellipses


@numba.njit(nogil=True)
def first_broken(values: Any, limits: Numbers, is_minimum: npt.NDArray[np.bool_]) -> tuple[int, float]:
    """(the first broken limit or NONE, its value) of a tuple of values. is_minimum: whether each limit is a minimum."""
    for k in range(len(values)):
        if values[k] < limits[k] if is_minimum[k] else values[k] > limits[k]:
            return k, values[k]
    return NONE, 0.0
