"""Readers of files of rows: JSON lines, Parquet, Arrow, and folders of Hugging Face datasets, which hold any of them.

`Columns` maps a row's columns to a document: text, id, address, licence, and what else goes into `meta`. Memory is
bounded by the longest document and, in Arrow files, by the batches that they were written in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from moray.pipelines.corpus.files import File, lines, unreadable, words
from moray.pipelines.corpus.pieces import MALFORMED, OVERSIZED, Meta, Piece, Reject, decode, meta_of, printable

_BATCH_ROWS = 256
_REST_BYTES = 1 << 20  # what a JSON line may hold beside its text before it is skipped unread
_TEXT_KINDS = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
LICENSE = "license"  # in a document's meta, until it moves to the column of that name


@dataclass(frozen=True)
class Columns:
    """Where a row keeps what. `id=None`: a JSON line's `id` if it has one, else the row's number."""

    text: str = "text"
    id: str | None = None
    url: str | None = None
    license: str | None = None
    meta: tuple[str, ...] = ()

    def further(self) -> list[tuple[str, str]]:
        """(name in meta, column) of what a document carries beside its text."""
        named = [("url", self.url), (LICENSE, self.license)]
        return [(name, column) for name, column in named if column] + [(name, name) for name in self.meta]

    def wanted(self) -> list[str]:
        """Every column that a file must have."""
        chosen = [self.text, self.id, *(column for _, column in self.further())]
        return list(dict.fromkeys(name for name in chosen if name is not None))


def read_jsonl(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """One JSON object a line; its text and its key are in `columns`, the key is else the line's number."""
    try:
        stream = file.stream()
    except OSError as error:
        yield unreadable(error)
        return
    limit = 6 * max_bytes + _REST_BYTES  # JSON may write a byte as six (\u0041)
    with stream:
        numbered = enumerate(lines(stream, limit))
        while True:
            try:
                number, line = next(numbered)
            except StopIteration:
                return
            except OSError as error:
                yield file.damage(error)
                return
            if line is None:
                yield Reject(f"#{number}", OVERSIZED, f"a line of more than {limit} bytes")
            elif line.strip():
                yield _json_piece(line, number, max_bytes, columns)


def _json_piece(line: bytes, number: int, max_bytes: int, columns: Columns) -> Piece:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            return Reject(f"#{number}", MALFORMED, "not a JSON object")
        text = row[columns.text]
        named = row.get("id") if columns.id is None else row[columns.id]
    except KeyError as error:
        return Reject(f"#{number}", MALFORMED, f"no field {error}")
    except (ValueError, RecursionError) as error:
        return Reject(f"#{number}", MALFORMED, words(error))
    key = printable(f"#{number if named is None else named}")
    if not isinstance(text, str):
        return Reject(key, MALFORMED, f"the field {columns.text!r} is {type(text).__name__}, not a string")
    meta = meta_of([(name, row.get(column)) for name, column in columns.further()])
    return decode(text.encode("utf-8", "surrogatepass"), max_bytes, key, meta)


def read_parquet(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """A row is a document. A file without the columns, or that breaks off, counts once as malformed."""
    import pyarrow.parquet as pq

    def batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
        parquet = pq.ParquetFile(source)
        _check_columns(parquet.schema_arrow, columns)
        yield from parquet.iter_batches(_BATCH_ROWS, columns=columns.wanted(), use_threads=False)

    yield from _read_batches(file, batches, max_bytes, columns)


def read_arrow(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """As Parquet, from Arrow's own formats: a stream, as `datasets` writes it, or a file."""

    def batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            whole = pa.ipc.open_file(source)
            _check_columns(whole.schema, columns)
            found = (whole.get_batch(i) for i in range(whole.num_record_batches))
        else:
            found = pa.ipc.open_stream(source)
            _check_columns(found.schema, columns)
        for batch in found:
            _check_batch(batch, columns)
            yield batch

    yield from _read_batches(file, batches, max_bytes, columns)


def read_huggingface(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """A data file of a dataset's folder, by its name."""
    readers = {".parquet": read_parquet, ".arrow": read_arrow}
    yield from readers.get(file.suffixes[-1], read_jsonl)(file, max_bytes, columns)


def _check_columns(schema: pa.Schema, columns: Columns) -> None:
    """Raises KeyError with what is wrong, in words."""
    if missing := [name for name in columns.wanted() if name not in schema.names]:
        raise KeyError(f"no column {missing[0]!r}; there are: {', '.join(schema.names)}")


def _check_batch(batch: pa.RecordBatch, columns: Columns) -> None:
    """Raises ArrowInvalid where a column points out of its memory, which nobody else checks in Arrow's own formats.

    A column of strings is looked at as bytes: one row of bad UTF-8 is no reason to leave out all.
    """
    for name in columns.wanted():
        column = batch.column(name)
        bare = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
        (column.view(bare) if bare else column).validate(full=True)


def _read_batches(file: File, batches: Any, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """Documents from what `batches` makes of the open file; whatever is wrong with the file ends it."""
    try:
        source = file.open()
    except OSError as error:
        yield unreadable(error)
        return
    number = 0
    with source:
        try:
            for batch in batches(source):
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    part = batch.slice(start, _BATCH_ROWS)
                    yield from _pieces(part, number, max_bytes, columns)
                    number += part.num_rows
        except (OSError, KeyError, ValueError, OverflowError, SystemError, pa.ArrowException) as error:
            yield Reject("", MALFORMED, error.args[0][:200] if isinstance(error, KeyError) else words(error))


def _pieces(batch: pa.RecordBatch, first: int, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    texts = _as_bytes(batch.column(columns.text), columns.text)
    names = [None] * batch.num_rows if columns.id is None else _values(batch.column(columns.id))
    metas = _metas(batch, columns)
    for i, (text, name) in enumerate(zip(texts, names, strict=True)):
        if isinstance(name, bytes):
            name = name.decode(errors="replace")  # noqa: PLW2901
        key = printable(f"#{first + i if name is None else name}")
        yield decode(text.as_py() or b"", max_bytes, key, metas[i])


def _metas(batch: pa.RecordBatch, columns: Columns) -> list[Meta]:
    named = columns.further()
    if not named:
        return [()] * batch.num_rows
    values = [_values(batch.column(column)) for _, column in named]
    names = [name for name, _ in named]
    return [meta_of(list(zip(names, row, strict=True))) for row in zip(*values, strict=True)]


def _values(column: pa.Array) -> list[Any]:
    """A column as Python's values; strings that hold bad UTF-8 as bytes."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return list(_as_bytes(column, "").to_pylist())


def _as_bytes(column: Any, name: str) -> Any:
    """A column of strings as bytes, so that a row of bad UTF-8 costs only itself. KeyError if it is not text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not any(getattr(pa.types, kind)(column.type) for kind in _TEXT_KINDS):
        raise KeyError(f"the column {name!r} is {column.type}, not text")
    return column.cast(pa.large_binary())
