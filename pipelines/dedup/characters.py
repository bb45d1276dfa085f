"""What a character is to dedup: part of a word, a word of its own, or between words; and its lower case.

Words are runs of letters, digits, underscores and combining marks. Chinese, Japanese and Korean write no spaces: there
every ideograph, kana or syllable is a word, or whole clauses would be one and no two texts alike (`\\w+` misses most
near duplicates in these languages).
"""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
import numpy.typing as npt

BETWEEN, WORD, ALONE = 0, 1, 2
SIZE = 0x20000  # code points from here on are ideographs, up to 0x3FFFF, or between words
_ALONE = (
    (0x1100, 0x1200), (0x2E80, 0x2FE0), (0x3005, 0x3008), (0x3021, 0x302A), (0x3031, 0x3036), (0x3038, 0x303D),
    (0x3041, 0x3100), (0x3105, 0x3130), (0x3131, 0x318F), (0x31A0, 0x31C0), (0x31F0, 0x3200), (0x3400, 0x4DC0),
    (0x4E00, 0xA000), (0xA960, 0xA980), (0xAC00, 0xD800), (0xF900, 0xFB00), (0xFF66, 0xFFDD), (0x1AFF0, 0x1B170),
)  # fmt: skip


@cache
def tables() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]:
    """(kind, lower case), by code point below SIZE. Of a lower case of several characters the first counts; one that is
    in ASCII where the character is not (the Kelvin sign, a dotted capital I) does not: words of ASCII are bytes."""
    kinds = np.zeros(SIZE, np.uint8)
    lowers = np.arange(SIZE, dtype=np.uint32)
    for code in range(SIZE):
        character = chr(code)
        if character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M":
            kinds[code] = WORD
            lower = ord(character.lower()[0])
            lowers[code] = lower if code < 128 or lower >= 128 else code
    for begin, end in _ALONE:
        kinds[begin:end] = np.where(kinds[begin:end] == WORD, ALONE, BETWEEN)
    return kinds, lowers
