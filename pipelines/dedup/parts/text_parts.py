"""Splitting a text into lines or paragraphs, and cutting spans from it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from moray.pipelines.text.characters import JOIN, SIZE, UNSEEN, WORD, fold, tables

_LINE_END = re.compile("\n")
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")  # without the indentation of the next paragraph


def parts_of(text: str, unit: str) -> Iterator[tuple[int, int]]:
    """(begin, end) of each line or paragraph, including its separator; together they cover the text."""
    begin = 0
    for found in (_LINE_END if unit == "line" else _BLANK_LINES).finditer(text):
        yield begin, found.end()
        begin = found.end()
    if begin < len(text):
        yield begin, len(text)


def normalized(part: str) -> str:
    """The form in which parts are compared: without differences of case, white space and Unicode normalization."""
    if not part.isascii():
        part = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", part.translate(UNSEEN)).casefold())
    return " ".join(part.casefold().split())


def cut_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text without `spans`, which are ascending and not adjacent. Inserts a space where two words would join."""
    last, at = "", 0
    pieces: list[str] = []
    for begin, end in [*spans, (len(text), len(text))]:
        piece = text[at:begin]
        if piece:
            if _in_word(last) and _in_word(_first_visible(piece)):
                pieces.append(" ")
            pieces.append(piece)
            last = _first_visible(piece[::-1]) or last
        at = end
    return "".join(pieces)


def _first_visible(text: str) -> str:
    """The first character that takes part in comparisons: neither a combining mark nor invisible. '' if none."""
    return next((character for character in text if fold(character)), "")


def _in_word(character: str) -> bool:
    kinds, _ = tables()
    return any(code < SIZE and kinds[code] in (WORD, JOIN) for code in map(ord, fold(character)))
