"""The words or characters of a text with their places: what dedup's kernel hashes, as strings that can be compared.

It is read for the few texts in which the kernel finds something: a hash says "perhaps", these say yes or no.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moray.pipelines.text.characters import (
    ALONE,
    BETWEEN,
    IDEOGRAPHS,
    JOIN,
    SEVERAL,
    SIZE,
    SKIP,
    TAGS,
    WORD,
    tables,
    unspaced,
)

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """names[i] is unit i in the form that is compared (text/characters.py); it is text[begins[i] : ends[i]]."""

    text: str
    names: list[str]
    begins: Integers
    ends: Integers

    def __len__(self) -> int:
        return len(self.names)

    def holds(self, at: int, other: Units, other_at: int, size: int) -> bool:
        """Whether the n-gram at `at` is the other's at `other_at`."""
        return self.names[at : at + size] == other.names[other_at : other_at + size]

    def excerpt(self, at: int, size: int) -> str:
        """The n-gram as it is written in the text."""
        return self.text[self.begins[at] : self.ends[at + size - 1]]


def is_telling(name: str, characters: bool) -> bool:
    """Whether a unit is more than a number or a letter that counts: a word of two letters or an ideograph; a letter,
    where characters are units."""
    letters = sum(map(str.isalpha, name))
    if characters or letters != 1:
        return letters > 0
    code = ord(name[0])
    return bool(tables()[0][code] == ALONE) if code < SIZE else True


def without_spaces(units: Units) -> bool:
    """Whether most words are letters of a script that writes no spaces, whose words have several of them."""
    return sum(unspaced(ord(name[0])) for name in units.names) * 2 > len(units)


def units_of(text: str, characters: bool) -> Units:
    """Units in order; of characters, a run of others between two is one that is called " "."""
    codes, kinds, places, ends = _folded(text)
    between = kinds == BETWEEN
    starts = _starts(kinds, characters)
    firsts = np.flatnonzero(starts)
    bounds = np.append(np.flatnonzero(starts | between), len(kinds))
    lasts = bounds[np.searchsorted(bounds, firsts, side="right")]
    folded = codes.astype("<u4").tobytes().decode("utf-32-le")
    names = [folded[first:last] for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]
    begins, ends = places[firsts], ends[lasts - 1]
    if not characters:
        return Units(text, names, begins, ends)
    gaps = np.flatnonzero(firsts[1:] > lasts[:-1])
    at = gaps + 1
    named = np.insert(np.array(names, object), at, " ")
    after = np.minimum(ends[gaps], begins[gaps + 1])  # one character may be of two units
    return Units(text, named.tolist(), np.insert(begins, at, after), np.insert(ends, at, begins[gaps + 1]))


def _folded(text: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8], Integers, Integers]:
    """The folded form: code points, kinds, and of each where the character that it is from begins in the text and
    ends, with what does not count behind it."""
    known, folds = tables()
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    inside = np.minimum(codes, SIZE - 1)
    beyond = np.where(codes < IDEOGRAPHS, ALONE, np.where((codes >= TAGS[0]) & (codes < TAGS[1]), SKIP, BETWEEN))
    kinds = np.where(codes < SIZE, known[inside], beyond).astype(np.uint8)
    codes = np.where(codes < SIZE, folds[inside], codes)
    counted = np.append(np.where(kinds == SKIP, len(kinds), np.arange(len(kinds))), len(kinds))
    ends = np.minimum.accumulate(counted[::-1])[::-1][1:]
    several = kinds == SEVERAL
    lengths = np.where(several, folds[np.where(several, codes, 0)], kinds != SKIP).astype(np.int64)
    places = np.repeat(np.arange(len(kinds)), lengths)
    number = np.arange(len(places)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    told = several[places]
    codes = codes[places]
    codes[told] = folds[codes[told] + 1 + number[told]]
    kinds = kinds[places]
    kinds[told] = known[codes[told]]
    return codes, kinds, places, ends[places]


def _starts(kinds: npt.NDArray[np.uint8], characters: bool) -> npt.NDArray[np.bool_]:
    """Whether a unit begins with each character: after what is no part of one; of words, also with a letter that is
    one of its own, and after such a letter and its marks."""
    before = np.concatenate(([BETWEEN], kinds[:-1]))
    if characters:
        return (kinds != BETWEEN) & ((before == BETWEEN) | (kinds != JOIN))
    carrier = np.maximum.accumulate(np.where(before == JOIN, 0, np.arange(len(kinds))))  # what marks before it are on
    after_alone = (kinds == WORD) & (before[carrier] == ALONE)
    return (kinds != BETWEEN) & ((before == BETWEEN) | (kinds == ALONE) | after_alone)
