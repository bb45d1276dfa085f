"""Readers of files with one document each, and of packages that hold a book as a Python module."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from moray.pipelines.corpus.pieces import MALFORMED, Piece, Reject, decode_text
from moray.pipelines.corpus.rows import Columns
from moray.pipelines.corpus.source_file import File, trailing_data, unreadable


def read_text(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """Reads a file of text or code as one document."""
    try:
        stream = file.stream()
    except OSError as error:
        yield unreadable(error)
        return
    with stream:
        try:
            data = stream.read(max_bytes + 1)
        except OSError as error:
            yield file.damage(error)
            return
        yield decode_text(data, max_bytes, "")
        yield from trailing_data(stream)


def read_pythonbible(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """Reads a `plain_text_bible.py` of the pythonbible-* packages as one document per chapter.

    The module calls `Bible(version, text, {verse: start}, {verse: end})` with verse = book * 1e6 + chapter * 1e3 +
    number. It is parsed, not imported.
    """
    try:
        with file.stream() as stream:
            data = stream.read()
    except OSError as error:
        yield unreadable(error)
        return
    try:
        chapters = bible_chapters(data)
    except Exception:  # another kind of file can cause errors of any type
        yield Reject("", MALFORMED, "not a module of a pythonbible package")
        return
    for chapter, text in chapters.items():
        yield decode_text(text.encode(), max_bytes, f"#{chapter}")


def bible_chapters(data: bytes) -> dict[int, str]:
    """Texts by chapter (book * 1000 + number). Raises StopIteration, SyntaxError or ValueError for other files."""
    call = next(node for node in ast.walk(ast.parse(data)) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    chapters: dict[int, list[str]] = {}
    for verse, start in starts.items():
        chapters.setdefault(verse // 1000, []).append(text[start : ends[verse]].strip())
    return {chapter: " ".join(verses) for chapter, verses in chapters.items()}
