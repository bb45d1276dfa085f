"""The C4 rules (JMLR 21 (140), 2.2), which remove lines and drop documents that become too small. Compiled by numba.

The decisions equal those of datatrove 0.10, which follows the original C4 code: line by line, in the order below, and
with citation marks removed. C4 counts sentences with a trained splitter. Here a sentence ends at a terminal mark, with
any closing quotes or brackets, that is followed by white space or the end of the line.
"""

from __future__ import annotations

import numba

from moray.pipelines.filter.character_kinds import CLOSING, DIGIT, SPACE, TERMINAL
from moray.pipelines.filter.document_layout import (
    EMPTY,
    NEWLINE,
    NONE,
    ZERO,
    Bytes,
    Codes,
    DocumentLayout,
    Numbers,
    Places,
    ends_in_ellipsis,
    line_end,
    stripped,
)

# Indices of limits, in the order of the fields of C4 in config.py. For rules without a number, 0 is on and NaN is off.
SENTENCES, LOREM, CURLY, WORDS, LONGEST, PUNCTUATION, CITATIONS, JAVASCRIPT, POLICY = range(9)
PHRASES = (
    "[edit]", "[citation needed]", "lorem ipsum", "javascript",
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip
_EDIT, _CITATION, _LOREM, _JAVASCRIPT, _POLICY = range(5)
_OPEN, _CLOSE, _CURLY, _KELVIN = 91, 93, 123, 0x212A
_ENDS = (46, 63, 33, 34, 39)  # . ? ! " '


@numba.njit(nogil=True, cache=True, inline="always")
def _lower(code: int) -> int:
    """The lower case of ASCII letters and of the Kelvin sign, the only other character whose lower case is ASCII."""
    if 65 <= code <= 90:
        return code + 32
    return 107 if code == _KELVIN else code


@numba.njit(nogil=True)
def _begins_with(codes: Codes, begin: int, end: int, phrase: Codes, any_case: bool) -> bool:
    if end - begin < len(phrase):
        return False
    for k in range(len(phrase)):
        code = int(codes[begin + k])
        if (_lower(code) if any_case else code) != phrase[k]:
            return False
    return True


@numba.njit(nogil=True)
def _phrase(phrases: Codes, bounds: Places, number: int) -> Codes:
    return phrases[bounds[number] : bounds[number + 1]]


@numba.njit(nogil=True)
def _holds(codes: Codes, begin: int, end: int, phrases: Codes, bounds: Places, first: int, last: int) -> bool:
    """Whether [begin, end) contains one of the phrases [first, last), in any case. Phrases are in lower case."""
    for number in range(first, last):
        phrase = _phrase(phrases, bounds, number)
        for i in range(begin, end - len(phrase) + 1):
            if _lower(int(codes[i])) == phrase[0] and _begins_with(codes, i, end, phrase, True):
                return True
    return False


@numba.njit(nogil=True)
def _has(codes: Codes, begin: int, end: int, code: int) -> bool:
    found = False
    for i in range(begin, end):
        found |= codes[i] == code
    return found


@numba.njit(nogil=True)
def _citation_end(document: DocumentLayout, at: int, end: int, phrases: Codes, bounds: Places) -> int:
    """The end of the citation mark that begins at `at`; `at` if there is none."""
    following = at + 1
    while following < end and document.bits[following] & DIGIT:
        following += 1
    if following < end and document.codes[following] == _CLOSE:
        return following + 1
    for number in (_EDIT, _CITATION):
        phrase = _phrase(phrases, bounds, number)
        if _begins_with(document.codes, at, end, phrase, False):
            return at + len(phrase)
    return at


@numba.njit(nogil=True)
def _copy(
    document: DocumentLayout,
    begin: int,
    end: int,
    citations: bool,
    phrases: Codes,
    bounds: Places,
    out: DocumentLayout,
    to: int,
) -> int:
    """Copies [begin, end) to `out` at `to`, without citation marks if `citations`. Returns the end in `out`."""
    at = begin
    while at < end:
        if citations and document.codes[at] == _OPEN:
            following = _citation_end(document, at, end, phrases, bounds)
            if following > at:
                at = following
                continue
        out.codes[to], out.bits[to] = document.codes[at], document.bits[at]
        at += 1
        to += 1
    return to


@numba.njit(nogil=True)
def _words(bits: Bytes, begin: int, end: int) -> tuple[int, int]:
    """(words, characters of the longest word)."""
    words = longest = length = 0
    for i in range(begin, end):
        length = 0 if bits[i] & SPACE else length + 1
        words += length == 1
        longest = max(longest, length)
    return words, longest


@numba.njit(nogil=True)
def _sentences(bits: Bytes, begin: int, end: int) -> int:
    sentences, at, open_ = 0, begin, False
    while at < end:
        open_ |= not bits[at] & SPACE
        if bits[at] & TERMINAL:
            while at + 1 < end and bits[at + 1] & (TERMINAL | CLOSING):
                at += 1
            if at + 1 == end or bits[at + 1] & SPACE:
                sentences += 1
                open_ = False
        at += 1
    return sentences + open_


@numba.njit(nogil=True)
def _ends_well(codes: Codes, begin: int, end: int) -> bool:
    if begin == end or ends_in_ellipsis(codes, begin, end):
        return False
    return codes[end - 1] in _ENDS


@numba.njit(nogil=True)
def _check_line(
    out: DocumentLayout, begin: int, end: int, words: int, limits: Numbers, phrases: Codes, bounds: Places
) -> int:
    """The decision for a line: NONE keeps it, EMPTY removes it, LOREM or CURLY drops the document."""
    codes = out.codes
    if (limits[PUNCTUATION] == 0 and not _ends_well(codes, begin, end)) or words < limits[WORDS]:
        return EMPTY
    if limits[LOREM] == 0 and _holds(codes, begin, end, phrases, bounds, _LOREM, _JAVASCRIPT):
        return LOREM
    if limits[JAVASCRIPT] == 0 and _holds(codes, begin, end, phrases, bounds, _JAVASCRIPT, _POLICY):
        return EMPTY
    if limits[CURLY] == 0 and _has(codes, begin, end, _CURLY):
        return CURLY
    if limits[POLICY] == 0 and _holds(codes, begin, end, phrases, bounds, _POLICY, len(PHRASES)):
        return EMPTY
    return NONE


@numba.njit(nogil=True)
def c4(
    document: DocumentLayout, limits: Numbers, phrases: Codes, bounds: Places, out: DocumentLayout
) -> tuple[int, float, int, int]:
    """Returns (the broken limit or NONE, its value, begin and end of the remaining text in `out`).

    phrases: the characters of PHRASES, concatenated. bounds: the begin of each, and the end of the last. out: has the
    capacity of the document.
    """
    sentences = written = at = ZERO
    while at < len(document.codes):
        end, following = line_end(document.codes, document.bits, at)
        begin, end = stripped(document.bits, at, end)
        at = following
        words, longest = _words(document.bits, begin, end)
        if longest > limits[LONGEST]:
            continue
        stop = _copy(document, begin, end, limits[CITATIONS] == 0, phrases, bounds, out, written)
        decision = _check_line(out, written, stop, words, limits, phrases, bounds)
        if decision == EMPTY:
            continue
        if decision != NONE:
            return decision, 1.0, 0, 0
        sentences += _sentences(out.bits, written, stop)
        out.codes[stop], out.bits[stop] = NEWLINE, SPACE
        written = stop + 1
    if sentences < limits[SENTENCES]:
        return SENTENCES, float(sentences), 0, 0
    begin, end = stripped(out.bits, 0, written)
    return (NONE if begin < end else EMPTY), 0.0, begin, end
