"""A text in lines or paragraphs, and a text without some of its characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from moray.pipelines.text.characters import JOIN, SIZE, UNSEEN, WORD, fold, tables

_LINE_END = re.compile("\n")
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")  # not what the next paragraph's first line is indented by


def parts_of(text: str, unit: str) -> Iterator[tuple[int, int]]:
    """(begin, end) of each line or paragraph, what parts it from the next one included; together they are the text."""
    begin = 0
    for found in (_LINE_END if unit == "line" else _BLANK_LINES).finditer(text):
        yield begin, found.end()
        begin = found.end()
    if begin < len(text):
        yield begin, len(text)


def normalized(part: str) -> str:
    """What makes two parts the same: case, white space and forms of Unicode do not matter (text/characters.py)."""
    if not part.isascii():
        part = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", part.translate(UNSEEN)).casefold())
    return " ".join(part.casefold().split())


def without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text without ascending spans that do not touch. Where two words would become one, a space parts them."""
    kept, at = "", 0
    pieces: list[str] = []
    for begin, end in [*spans, (len(text), len(text))]:
        piece = text[at:begin]
        if piece:
            if _in_word(kept) and _in_word(_counted(piece)):
                pieces.append(" ")
            pieces.append(piece)
            kept = _counted(piece[::-1]) or kept
        at = end
    return "".join(pieces)


def _counted(text: str) -> str:
    """The first character that is compared: no accent of another, and nothing that is not seen."""
    return next((character for character in text if fold(character)), "")


def _in_word(character: str) -> bool:
    kinds, _ = tables()
    return any(code < SIZE and kinds[code] in (WORD, JOIN) for code in map(ord, fold(character)))
