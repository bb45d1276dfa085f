"""A document as the rules see it: its characters, what each is, and its words; and counting what comes twice.

Words are what lies between white space. Texts are compared by 64-bit hashes. Compiled by numba.

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
ZERO: Any = np.int64(0)  # of a literal 0 numba would compile every function called with it once more
NONE = -1  # no rule is broken
EMPTY = -2  # nothing is there, or left
NEWLINE, RETURN = 10, 13


class DocumentLayout(NamedTuple):
    """codes [C], what they are [C], and words: where they begin, where they end, a hash [W]."""

    codes: Codes
    bits: Bytes
    begins: Places
    ends: Places
    words: Hashes


class Counts(NamedTuple):
    """A hash table that is emptied by turning `clock[0]`. By slot: the key, and the clock when it was set and how often
    it came, as one number; by order of first coming, of which there were `clock[1]`: the slot, and the place."""

    keys: Hashes
    times: Places
    slots: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]
    clock: Places


def counts_for(items: int) -> Counts:
    """Room for that many different keys."""
    room = 1 << max(4, int(2 * items).bit_length())
    return Counts(
        np.zeros(room, np.uint64),
        np.zeros(room, np.int64),
        np.zeros(items + 1, np.int32),
        np.zeros(items + 1, np.int32),
        np.zeros(2, np.int64),
    )


@numba.njit(nogil=True)
def empty_table(counts: Counts, items: int) -> int:
    """Empties the table for so many items; the mask that `count_key` takes: few items keep to little memory."""
    counts.clock[0] += 1
    counts.clock[1] = 0
    room = 16
    while room < 2 * items:
        room *= 2
    return room - 1


@numba.njit(nogil=True)
def count_key(counts: Counts, mask: int, key: np.uint64, place: int) -> int:
    """How often this key has come before; counts it."""
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
    """(where it came first, how often) of the key that came most often, and first of those; there must be one."""
    best = most = 0
    for i in range(counts.clock[1]):
        times = counts.times[counts.slots[i]] & 0xFFFFFFFF
        if times > most:
            best, most = i, times
    return counts.places[best], most


@numba.njit(nogil=True)
def hash_of(codes: Codes, begin: int, end: int) -> np.uint64:
    """Of the characters [begin, end)."""
    found = _FIRST
    for i in range(begin, end):
        found = (found ^ np.uint64(codes[i])) * _PRIME
    return mixed(found)


@numba.njit(nogil=True)
def hash_of_words(words: Hashes, begin: int, count: int) -> np.uint64:
    found = words[begin]
    for i in range(begin + 1, begin + count):
        found = found * _STEP + words[i]
    return mixed(found)


@numba.njit(nogil=True)
def decode_layout(data: Bytes, begin: int, end: int, table: Bytes, codes: Codes, bits: Bytes) -> int:
    """Writes the characters of data[begin:end], valid UTF-8, and what they are; how many."""
    count, at = 0, begin
    while at < end:
        code, at = decoded(data, at)
        codes[count] = code
        bits[count] = table[code] if code < SIZE else 0
        count += 1
    return count


@numba.njit(nogil=True)
def find_words(codes: Codes, bits: Bytes, count: int, begins: Places, ends: Places, words: Hashes) -> int:
    """Writes where the words of the first `count` characters are, and their hashes; how many."""
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
    """Writes characters as UTF-8 from out[at] on; where they end."""
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
    """(where the line that begins here ends, where the next begins), as `str.splitlines` has it."""
    end = begin
    while end < len(codes) and not bits[end] & BREAK:
        end += 1
    if end + 1 < len(codes) and codes[end] == RETURN and codes[end + 1] == NEWLINE:
        return end, end + 2
    return end, end + 1


@numba.njit(nogil=True)
def stripped(bits: Bytes, begin: int, end: int) -> tuple[int, int]:
    """[begin, end) without white space around."""
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
    """('#', ellipses): '...' without overlap, and the character for it."""
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
def first_broken(values: Any, limits: Numbers, least: npt.NDArray[np.bool_]) -> tuple[int, float]:
    """(the first limit that is broken or NONE, its value) of a tuple of values; least: which are least values."""
    for k in range(len(values)):
        if values[k] < limits[k] if least[k] else values[k] > limits[k]:
            return k, values[k]
    return NONE, 0.0
