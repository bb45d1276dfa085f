"""Readers that turn a file of a package into documents: pairs of (key within the file, text).

The readers take bytes and do not depend on the location of a file.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator

from moray.pipelines.corpus.text_readers import bible_chapters

Texts = Iterator[tuple[str, str]]

PIECE = 20_000  # characters of a long book in one document
_PROGRAM = ("task_description", "input_output_spec", "code_sample", "input_generator")
_ROFF_COMMENT = re.compile(r"^['.]\\\".*\n?", re.M)
_ROFF_REQUEST = re.compile(r"^[.'][A-Za-z]+ ?", re.M)
_ROFF_ESCAPE = re.compile(r"\\f[BIRP]|\\f\(..|\\[&/,|^]|\\\(..|\\s[-+]?\d")


def whole(data: bytes) -> Texts:
    """The whole file as one document, decompressed if need be."""
    yield "", decoded(data)


def man_page(data: bytes) -> Texts:
    """The words of a manual page, without roff's comments, requests and fonts."""
    text = _ROFF_REQUEST.sub("", _ROFF_COMMENT.sub("", decoded(data)))
    yield "", _ROFF_ESCAPE.sub("", text).replace("\\-", "-").replace("\\e", "\\")


def fortunes(data: bytes) -> Texts:
    """Sayings, separated by lines that start with a percent sign."""
    for number, text in enumerate(re.split(r"^%.*\n", decoded(data), flags=re.M)):
        yield f"#{number}", text


def chapters(data: bytes) -> Texts:
    """A translation of the pythonbible packages, one document per chapter."""
    for chapter, text in bible_chapters(data).items():
        yield f"#{chapter}", text


def pieces(data: bytes) -> Texts:
    """A book in pieces of equal length."""
    text = decoded(data)
    for start in range(0, len(text), PIECE):
        yield f"#{start // PIECE}", text[start : start + PIECE]


def programs(data: bytes) -> Texts:
    """Tasks and the programs that solve them, from one JSON list or one JSON object per line."""
    text = decoded(data)
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    for number, row in enumerate(rows):
        yield f"#{number}", "\n\n".join(row[field] for field in _PROGRAM)


def problems(data: bytes) -> Texts:
    """HumanEval, one document per problem with its solution."""
    for line in decoded(data).splitlines():
        row = json.loads(line)
        yield f"#{row['task_id']}", row["prompt"] + row["canonical_solution"]


def decoded(data: bytes) -> str:
    """Text of a file that may be compressed by gzip, decoded as UTF-8 or, if that fails, as Latin-1."""
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")
