"""Unicode tables for dedup: the characters that form words, and the normalized form in which texts are compared.

Texts are compared in Unicode's compatibility decomposition with full case folding (NFKD and case folding, as in
NFKC_Casefold of UAX #44), without accents and invisible characters. Texts therefore compare equal across composed and
decomposed forms, full-width forms, ligatures, "STRASSE" and "Straße", soft hyphens and zero-width spaces.

A word is a run of letters, digits, underscores and marks. In scripts without spaces between words, every letter with
its marks is a word. Otherwise a whole clause would be one word, and similar texts would share no words.
"""

from __future__ import annotations

import unicodedata
from functools import cache

import numpy as np
import numpy.typing as npt

# Kinds of characters. BETWEEN: separates words. WORD: part of a word. ALONE: a word by itself. JOIN: continues the word
# or letter before it. SKIP: ignored. SEVERAL: folds to several characters, see `tables`.
BETWEEN, WORD, ALONE, JOIN, SKIP, SEVERAL = range(6)
SIZE = 0x30000  # code points in the tables; all from here to IDEOGRAPHS are ideographs, TAGS are invisible
IDEOGRAPHS = 0x40000
TAGS = (0xE0000, 0xE1000)
# Scripts in which every letter is a word: Chinese, Japanese, Korean (ideographs, kana, syllables), ...
_EAST_ASIAN = (
    (0x1100, 0x1200), (0x2E80, 0x2FE0), (0x3005, 0x3008), (0x3021, 0x302A), (0x3031, 0x3036), (0x3038, 0x303D),
    (0x3041, 0x3100), (0x3105, 0x3130), (0x31A0, 0x31C0), (0x31F0, 0x3200), (0x3400, 0x4DC0), (0x4E00, 0xA000),
    (0xA960, 0xA980), (0xAC00, 0xD800), (0x1AFF0, 0x1B170), (0x20000, SIZE),
)  # fmt: skip
# ... and the scripts of line breaking class SA (UAX #14: Thai, Lao, Burmese, Khmer, Tai scripts), Javanese, Balinese.
_SOUTH_EAST_ASIAN = (
    (0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x1950, 0x19E0), (0x1A20, 0x1AB0), (0x1B00, 0x1B80),
    (0xA980, 0xAA00), (0xAA60, 0xAAE0), (0x11700, 0x11750),
)  # fmt: skip
# Vowels and final consonants of Korean in decomposed syllables.
_JAMO = ((0x1160, 0x1200), (0xD7B0, 0xD800))
# For str.translate: Default_Ignorable_Code_Point (DerivedCoreProperties.txt) below SIZE, and the Arabic tatweel, which
# only stretches a line.
UNSEEN = {
    code: None
    for begin, end in (
        (0x00AD, 0x00AE),
        (0x034F, 0x0350),
        (0x061C, 0x061D),
        (0x0640, 0x0641),
        (0x115F, 0x1161),
        (0x17B4, 0x17B6),
        (0x180B, 0x1810),
        (0x200B, 0x2010),
        (0x202A, 0x202F),
        (0x2060, 0x2070),
        (0x3164, 0x3165),
        (0xFE00, 0xFE10),
        (0xFEFF, 0xFF00),
        (0xFFA0, 0xFFA1),
        (0xFFF0, 0xFFF9),
        (0x1BCA0, 0x1BCA4),
        (0x1D173, 0x1D17B),
    )
    for code in range(begin, end)
}
_DOTLESS_I = str.maketrans("\u0131", "i")  # the upper case of both is I, except in Turkish


@cache
def tables() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]:
    """(kinds, folds): the kind and the folded form of each code point below SIZE.

    kinds: uint8 [SIZE]. folds: uint32 [SIZE + more]. Where kinds[c] is SEVERAL, folds[c] is an index i into `folds`,
    folds[i] is a number n, and folds[i + 1 : i + 1 + n] are the folded code points. Their kinds are neither SKIP nor
    SEVERAL.
    """
    kinds = np.zeros(SIZE, np.uint8)
    folds = np.arange(SIZE, dtype=np.uint32)
    for code in range(0x80):
        kinds[code] = _kind(code)
        folds[code] = ord(chr(code).lower())
    for first, last in ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0x20000, 0x2F800), (0x2FA20, SIZE)):  # fold to themselves
        kinds[first:last] = ALONE
    several: list[int] = []
    for code in (np.flatnonzero(kinds[0x80:] == BETWEEN) + 0x80).tolist():
        if unicodedata.category(chr(code)) in ("Cn", "Co", "Cs") and code not in UNSEEN:
            continue
        folded = fold(chr(code))
        if not folded:
            kinds[code] = SKIP
        elif len(folded) == 1:
            kinds[code], folds[code] = _kind(ord(folded)), ord(folded)
        else:
            kinds[code], folds[code] = SEVERAL, SIZE + len(several)
            several += [len(folded), *map(ord, folded)]
    return kinds, np.concatenate((folds, np.array(several, np.uint32)))


def fold(character: str) -> str:
    """The normalized form of a character.

    A character that would expand to more characters than its UTF-8 bytes, such as U+FDFA or U+337F, is only lowercased,
    because the kernels' buffers hold one word per byte.
    """
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold()).translate(_DOTLESS_I)
    kept = "".join(one for one in folded if not unicodedata.combining(one) and ord(one) not in UNSEEN)
    return kept if len(kept) <= len(character.encode(errors="surrogatepass")) else character.lower()


def unspaced(code: int) -> bool:
    """Whether a code point is of a South East Asian script without spaces, in which words have several letters."""
    return _within(code, _SOUTH_EAST_ASIAN)


def _kind(code: int) -> int:
    """Kind of a folded character."""
    category = unicodedata.category(chr(code))
    if category[0] == "M" or _within(code, _JAMO):
        return JOIN
    if not chr(code).isalnum() and code != ord("_"):
        return BETWEEN
    return ALONE if category != "Nd" and _within(code, (*_EAST_ASIAN, *_SOUTH_EAST_ASIAN)) else WORD


def _within(code: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(begin <= code < end for begin, end in ranges)
