"""Readers: from a source's files to (key, text) pairs, with a reason for everything left out.

A reader never raises for bad content: what cannot be used is counted under `unreadable`, `empty`, `binary`,
`not_utf8`, `oversized` or `malformed`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path

# A piece of a file: (key suffix, text), or (key suffix, None, reason).
Piece = tuple[str, str] | tuple[str, None, str]


def read_text(path: Path, max_bytes: int) -> Iterator[Piece]:
    """A file of text or code is one document."""
    data = _read(path)
    if isinstance(data, str):
        yield "", None, data
        return
    yield _decode(data, max_bytes, "")


def read_jsonl(path: Path, max_bytes: int) -> Iterator[Piece]:
    """One JSON object a line; `text` is the document, `id` (if there) its key, else the line number."""
    data = _read(path)
    if isinstance(data, str):
        yield "", None, data
        return
    for number, line in enumerate(data.splitlines()):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["text"]
            key = f"#{row.get('id', number)}"
        except (ValueError, KeyError, TypeError, AttributeError):
            yield f"#{number}", None, "malformed"
            continue
        yield _decode(text.encode(), max_bytes, key) if isinstance(text, str) else (key, None, "malformed")


def read_pythonbible(path: Path, max_bytes: int) -> Iterator[Piece]:
    """A `plain_text_bible.py` of the pythonbible-* packages: one document a chapter.

    The module calls `Bible(version, text, {verse: start}, {verse: end})` with verse = book * 1e6 + chapter * 1e3 +
    number. It is parsed, not imported.
    """
    data = _read(path)
    if isinstance(data, str):
        yield "", None, data
        return
    try:
        call = next(node for node in ast.walk(ast.parse(data)) if isinstance(node, ast.Call))
        text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    except (StopIteration, SyntaxError, ValueError):
        yield "", None, "malformed"
        return
    chapters: dict[int, list[str]] = {}
    for verse, start in starts.items():
        chapters.setdefault(verse // 1000, []).append(text[start : ends[verse]].strip())
    for chapter, verses in chapters.items():
        yield _decode(" ".join(verses).encode(), max_bytes, f"#{chapter}")


READERS: dict[str, Callable[[Path, int], Iterator[Piece]]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "pythonbible": read_pythonbible,
}


def _read(path: Path) -> bytes | str:
    """The file's bytes, or the reason it has none to give."""
    try:
        return path.read_bytes()
    except OSError:
        return "unreadable"


def _decode(data: bytes, max_bytes: int, key: str) -> Piece:
    if not data.strip():
        return key, None, "empty"
    if len(data) > max_bytes:
        return key, None, "oversized"
    if b"\0" in data:
        return key, None, "binary"
    try:
        return key, data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        return key, None, "not_utf8"
