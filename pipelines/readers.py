"""Readers: from a source's files to (key, text) pairs, with a reason for everything left out.

A reader never raises for bad content: what cannot be used is counted under `unreadable`, `empty`, `binary`,
`not_utf8`, `oversized` or `malformed`. Files ending in .gz or .zst are decompressed as they are read; one that breaks
off or does not decompress counts once as `malformed`, after whatever came before the damage. Memory is bounded by
`max_bytes`, not by the size of a file, because a few KB of .gz can hold GBs.
"""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

# A piece of a file: (key suffix, text), or (key suffix, None, reason).
Piece = tuple[str, str] | tuple[str, None, str]

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_BUFFER = 1 << 16
_BATCH_ROWS = 256
_REST_BYTES = 1 << 20  # what a JSON line may hold beside its text before it is skipped unread


@dataclass(frozen=True)
class Columns:
    """Where a row keeps its text and its id. `id=None`: a JSON line's `id` if it has one, else the row's number."""

    text: str = "text"
    id: str | None = None


DEFAULT_COLUMNS = Columns()


class Reader(Protocol):
    """Reads one file; documents of more than `max_bytes` UTF-8 bytes are left out."""

    def __call__(self, path: Path, max_bytes: int, columns: Columns = ..., /) -> Iterator[Piece]: ...


def read_text(path: Path, max_bytes: int, columns: Columns = DEFAULT_COLUMNS) -> Iterator[Piece]:
    """A file of text or code is one document."""
    try:
        file = _open(path)
    except OSError:
        yield "", None, "unreadable"
        return
    with file:
        try:
            data = file.read(max_bytes + 1)
        except OSError:
            yield "", None, _damage(path)
            return
    yield _decode(data, max_bytes, "")


def read_jsonl(path: Path, max_bytes: int, columns: Columns = DEFAULT_COLUMNS) -> Iterator[Piece]:
    """One JSON object a line; its text and its key are in `columns`, the key is else the line's number."""
    try:
        file = _open(path)
    except OSError:
        yield "", None, "unreadable"
        return
    limit = 6 * max_bytes + _REST_BYTES  # JSON may write a byte as six (\u0041)
    with file:
        lines = enumerate(_lines(file, limit))
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except OSError:
                yield "", None, _damage(path)
                return
            if line is None:
                yield f"#{number}", None, "oversized"
            elif line.strip():
                yield _json_piece(line, number, max_bytes, columns)


def _json_piece(line: bytes, number: int, max_bytes: int, columns: Columns) -> Piece:
    try:
        row = json.loads(line)
        text = row[columns.text]
        named = row.get("id") if columns.id is None else row[columns.id]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"#{number}", None, "malformed"
    # JSON can spell half a surrogate pair, which is no text: in a key it becomes "?", of a text _decode says so.
    key = f"#{number if named is None else named}".encode(errors="replace").decode()
    if not isinstance(text, str):
        return key, None, "malformed"
    return _decode(text.encode("utf-8", "surrogatepass"), max_bytes, key)


def read_parquet(path: Path, max_bytes: int, columns: Columns = DEFAULT_COLUMNS) -> Iterator[Piece]:
    """A row is a document. A file without the columns, or that breaks off, counts once as malformed."""
    import pyarrow.parquet as pq

    try:
        file = pa.OSFile(str(path))
    except OSError:
        yield "", None, "unreadable"
        return
    wanted = [name for name in (columns.text, columns.id) if name is not None]
    number = 0
    with file:
        try:
            parquet = pq.ParquetFile(file)
            if not set(wanted) <= set(parquet.schema_arrow.names):
                raise KeyError(columns.text)
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=wanted, use_threads=False):
                texts = _as_bytes(batch.column(columns.text))
                names = texts if columns.id is None else batch.column(columns.id)
                for text, name in zip(texts, names, strict=True):
                    key = f"#{number}" if columns.id is None or not name.is_valid else f"#{name.as_py()}"
                    yield _decode(text.as_py() or b"", max_bytes, key)
                    number += 1
        except (OSError, KeyError, UnicodeDecodeError, pa.ArrowException):
            yield "", None, "malformed"


def _as_bytes(column: Any) -> Any:
    """A column of strings as bytes, so that a row of bad UTF-8 costs only itself. KeyError if it is not text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kinds = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    if not any(getattr(pa.types, kind)(column.type) for kind in kinds):
        raise KeyError(f"{column.type} is not text")
    return column.cast(pa.large_binary())


def read_pythonbible(path: Path, max_bytes: int, columns: Columns = DEFAULT_COLUMNS) -> Iterator[Piece]:
    """A `plain_text_bible.py` of the pythonbible-* packages: one document a chapter.

    The module calls `Bible(version, text, {verse: start}, {verse: end})` with verse = book * 1e6 + chapter * 1e3 +
    number. It is parsed, not imported.
    """
    try:
        data = path.read_bytes()
    except OSError:
        yield "", None, "unreadable"
        return
    try:
        chapters = bible_chapters(data)
    except (StopIteration, SyntaxError, ValueError):
        yield "", None, "malformed"
        return
    for chapter, text in chapters.items():
        yield _decode(text.encode(), max_bytes, f"#{chapter}")


def bible_chapters(data: bytes) -> dict[int, str]:
    """Texts by chapter (book * 1000 + number). StopIteration, SyntaxError or ValueError for another kind of file."""
    call = next(node for node in ast.walk(ast.parse(data)) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    chapters: dict[int, list[str]] = {}
    for verse, start in starts.items():
        chapters.setdefault(verse // 1000, []).append(text[start : ends[verse]].strip())
    return {chapter: " ".join(verses) for chapter, verses in chapters.items()}


READERS: dict[str, Reader] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "pythonbible": read_pythonbible,
}


def _open(path: Path) -> io.BufferedReader:
    """The file's bytes as a stream, decompressed if its name says that it is compressed. Raises OSError."""
    file = pa.OSFile(str(path))
    kind = _COMPRESSION.get(path.suffix.lower())
    # pyarrow's streams read like raw files but are not declared as such.
    stream: Any = pa.CompressedInputStream(file, kind) if kind else file
    return io.BufferedReader(stream, _BUFFER)


def _damage(path: Path) -> str:
    """What an error in the middle of a file means: a bad archive, or for a plain file a bad disk."""
    return "malformed" if path.suffix.lower() in _COMPRESSION else "unreadable"


def _lines(file: io.BufferedReader, limit: int) -> Iterator[bytes | None]:
    """The lines of a file; None for one of more than `limit` bytes, which is skipped without keeping it."""
    while line := file.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(_BUFFER)) and not rest.endswith(b"\n"):
            pass
        yield None


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
