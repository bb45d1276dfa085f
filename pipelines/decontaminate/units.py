"""The words or characters of a text with their places: what dedup's kernel hashes, as strings that can be compared.

It is read for the few texts in which the kernel finds something: a hash says "perhaps", these say yes or no.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moray.pipelines.dedup.characters import ALONE, BETWEEN, SIZE, WORD, tables

_LAST = 0x40000  # code points from SIZE up to here are ideographs, those above are between words


@dataclass(frozen=True)
class Units:
    """names[i] is unit i in lower case; it is text[begins[i] : ends[i]]."""

    text: str
    names: list[str]
    begins: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

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


def units_of(text: str, characters: bool) -> Units:
    """Units in order; of characters, a run of others between two is one that is called " "."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known, lowers = tables()
    inside = np.minimum(codes, SIZE - 1)
    kinds = np.where(codes < SIZE, known[inside], np.where(codes < _LAST, ALONE, BETWEEN))
    lower = np.where(codes < SIZE, lowers[inside], codes).astype("<u4").tobytes().decode("utf-32-le")
    begins, ends = _characters(kinds) if characters else _words(kinds)
    names = [lower[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
    if characters:
        names = [name if kinds[begin] != BETWEEN else " " for name, begin in zip(names, begins.tolist(), strict=True)]
    return Units(text, names, begins, ends)


def _words(kinds: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """[begin, end) of each run of WORD, and of each ALONE."""
    word = np.concatenate(([False], kinds == WORD, [False]))
    alone = np.flatnonzero(kinds == ALONE)
    begins = np.concatenate((np.flatnonzero(word[1:] & ~word[:-1]), alone))
    ends = np.concatenate((np.flatnonzero(word[:-1] & ~word[1:]), alone + 1))
    order = np.argsort(begins)
    return begins[order], ends[order]


def _characters(kinds: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """[begin, end) of each character of words, and of what lies between two of them."""
    own = np.flatnonzero(kinds != BETWEEN)
    gaps = np.flatnonzero(np.diff(own) > 1)
    begins = np.concatenate((own, own[gaps] + 1))
    ends = np.concatenate((own + 1, own[gaps + 1]))
    order = np.argsort(begins)
    return begins[order], ends[order]
