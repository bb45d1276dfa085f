"""Readers of files of rows: JSON lines, Parquet, Arrow, and folders of Hugging Face datasets, which hold any of them.

`Columns` maps a row's columns to a document: text, id, address, licence, and what else goes into `meta`. Memory is
bounded by the longest document and, in Arrow files, by the batches that they were written in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from moray.pipelines.corpus.pieces import (
    MALFORMED,
    OVERSIZED,
    VALUE,
    Document,
    Lost,
    Piece,
    Reject,
    decode_text,
    meta_of,
    printable,
)
from moray.pipelines.corpus.source_file import File, behind, error_words, read_lines, unreadable
from moray.platform.core.errors import InputError

_BATCH_ROWS = 256
_REST_BYTES = 1 << 20  # what a JSON line may hold beside its text before it is skipped unread
_TEXT_KINDS = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
_UNREADABLE_ROWS = (pa.ArrowException, OSError, ValueError, OverflowError, SystemError)
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
        numbered = enumerate(read_lines(stream, limit))
        while True:
            try:
                number, line = next(numbered)
            except StopIteration:
                yield from behind(stream)
                return
            except OSError as error:
                yield file.damage(error)
                return
            if line is None:
                yield Reject(f"#{number}", OVERSIZED, f"a line of more than {limit} bytes")
            elif line.strip():
                yield from _json_pieces(line, number, max_bytes, columns)


def _json_pieces(line: bytes, number: int, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """The row's document, or why it is none; before it, what is lost of the values beside its text."""
    try:
        row = _json(line)
        if not isinstance(row, dict):
            yield Reject(f"#{number}", MALFORMED, "not a JSON object")
            return
        text = row[columns.text]
        named = row.get("id") if columns.id is None else row[columns.id]
        key = printable(f"#{number if named is None else named}")
    except KeyError as error:
        there = f"; there are: {', '.join(map(printable, row))}"[:150] if isinstance(row, dict) and row else ""
        yield Reject(f"#{number}", MALFORMED, f"no field {error}{there}")
        return
    except (ValueError, RecursionError) as error:
        is_array = not number and line.lstrip().startswith(b"[")
        what = (
            "the file is an array of JSON, which is not read: one object a line is" if is_array else error_words(error)
        )
        yield Reject(f"#{number}", MALFORMED, what)
        return
    if text is not None and not isinstance(text, str):
        yield Reject(key, MALFORMED, f"the field {columns.text!r} is {type(text).__name__}, not a string")
        return
    meta, lost = meta_of([(name, row.get(column)) for name, column in columns.further()])
    yield from (Reject(key, VALUE, reason) for reason in lost)
    yield _numbered(decode_text((text or "").encode("utf-8", "surrogatepass"), max_bytes, key, meta), named is None)


def _json(line: bytes) -> Any:
    """A line's value. Bytes that are no UTF-8 and numbers too long for Python cost what they stand in, not the line."""
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return json.loads(line.decode("utf-8", "surrogateescape"))
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(line, parse_int=str)


def _numbered(piece: Piece, numbered: bool) -> Piece:
    return piece._replace(numbered=numbered) if isinstance(piece, Document) else piece


Batches = Iterator[tuple[int, pa.RecordBatch | Reject]]


def read_parquet(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """A row is a document. A file without the columns counts once as malformed, and so does each row group that cannot
    be read; the others are."""
    import pyarrow.parquet as pq

    def batches(source: pa.NativeFile) -> Batches:
        parquet = pq.ParquetFile(source)
        _check_columns(parquet.schema_arrow, columns)
        first = 0
        for group in range(parquet.num_row_groups):
            yield from _row_group(parquet, group, first, columns)
            first += parquet.metadata.row_group(group).num_rows

    yield from _read_batches(file, batches, max_bytes, columns)


def _row_group(parquet: Any, group: int, first: int, columns: Columns) -> Batches:
    """Its batches, with the number of each one's first row; where a column beside the text cannot be read, without."""
    read = partial(parquet.iter_batches, _BATCH_ROWS, row_groups=[group], use_threads=False)
    row = first
    try:
        for batch in read(columns=columns.wanted()):
            yield row, batch
            row += batch.num_rows
        return
    except _UNREADABLE_ROWS as error:
        why = error_words(error)
    bad = {name: said for name in columns.wanted() if (said := _trouble(read, name))}
    if columns.text in bad or not bad:
        yield row, Reject("", MALFORMED, f"from row {row} on: {bad.get(columns.text, why)}")
        return
    yield row, Reject("", VALUE, f"from row {row} on, {'; '.join(f'{name!r}: {said}' for name, said in bad.items())}")
    at = first
    for batch in read(columns=[name for name in columns.wanted() if name not in bad]):
        if at >= row:
            yield at, batch
        at += batch.num_rows


def _trouble(read: Callable[..., Iterator[pa.RecordBatch]], column: str) -> str:
    """Why a column of a row group cannot be read; '' if it can."""
    try:
        for _ in read(columns=[column]):
            pass
    except _UNREADABLE_ROWS as error:
        return error_words(error)
    return ""


def read_arrow(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """As Parquet, from Arrow's own formats: a stream, as `datasets` writes it, or a file."""

    def batches(source: pa.NativeFile) -> Batches:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        whole = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        _check_columns(whole.schema, columns)
        found = (whole.get_batch(i) for i in range(whole.num_record_batches)) if is_file else iter(whole)
        row = 0
        for batch in found:
            try:
                _check_batch(batch, columns)
                yield row, batch
            except _UNREADABLE_ROWS as error:
                yield row, Reject("", MALFORMED, f"from row {row} on: {error_words(error)}")
            row += batch.num_rows

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

    Strings are looked at as bytes, within lists and the like too: bad UTF-8 is no reason to leave out a row.
    """
    for name in columns.wanted():
        column = batch.column(name)
        if pa.types.is_dictionary(column.type):
            words_of_it = column.dictionary.view(_bare(column.dictionary.type))
            column = pa.DictionaryArray.from_arrays(column.indices, words_of_it, safe=False)
        column.view(_bare(column.type)).validate(full=True)


def _bare(kind: pa.DataType) -> pa.DataType:
    """The type with bytes for strings."""
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(_bare(kind.field(i).type)) for i in range(kind.num_fields)])
    if pa.types.is_map(kind):
        return pa.map_(_bare(kind.key_type), _bare(kind.item_type))
    for is_kind, made in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_kind(kind):
            return made(kind.value_field.with_type(_bare(kind.value_type)))
    return {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(kind, kind)


def _read_batches(
    file: File, batches: Callable[[pa.NativeFile], Batches], max_bytes: int, columns: Columns
) -> Iterator[Piece]:
    """Documents from what `batches` makes of the open file, with the number of each batch's first row; whatever else is
    wrong with the file ends it."""
    try:
        source = file.open()
    except OSError as error:
        yield unreadable(error)
        return
    number = 0
    with source:
        try:
            for number, batch in batches(source):
                if isinstance(batch, Reject):
                    yield batch
                    continue
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield from _pieces(batch.slice(start, _BATCH_ROWS), number + start, max_bytes, columns)
        except InputError:
            raise
        except Exception as error:  # of Arrow's, or whatever a torn file makes it stumble over
            yield Reject("", MALFORMED, f"from row {number} on: {_said(error)}" if number else _said(error))


def _said(error: Exception) -> str:
    return str(error.args[0])[:200] if isinstance(error, KeyError) else error_words(error)


def _pieces(batch: pa.RecordBatch, first: int, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    texts = _as_bytes(batch.column(columns.text), columns.text)
    there, nothing = set(batch.schema.names), [None] * batch.num_rows
    names = values(batch.column(columns.id)) if columns.id in there else nothing
    further = columns.further()
    beside = [values(batch.column(column)) if column in there else nothing for _, column in further]
    for i, (text, name) in enumerate(zip(texts, names, strict=True)):
        named = None if isinstance(name, Lost) else name.decode(errors="replace") if isinstance(name, bytes) else name
        key = printable(f"#{first + i if named is None else named}")
        meta, lost = meta_of([(called, column[i]) for (called, _), column in zip(further, beside, strict=True)])
        if isinstance(name, Lost):
            lost.append(f"the value of {columns.id!r} cannot be written: {name.reason}")
        yield from (Reject(key, VALUE, reason) for reason in lost)
        yield _numbered(decode_text(text.as_py() or b"", max_bytes, key, meta), named is None)


def values(column: pa.Array) -> list[Any]:
    """A column as Python's values; what Python cannot hold as Arrow's text for it, or else as `Lost`."""
    try:
        return list(column.to_pylist())
    except Exception:  # dates before the year 1 or after 9999, zones that nobody knows, bad UTF-8, nanoseconds
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return _plain(scalar)
    except Exception as error:
        return Lost(error_words(error))


def _plain(scalar: Any) -> Any:
    """One value, part by part where it is not to be had as a whole. Raises whatever Arrow does."""
    try:
        return scalar.as_py()
    except Exception:
        kind = scalar.type
        return _parts(scalar, kind) if pa.types.is_nested(kind) else _bare_value(scalar, kind)


def _parts(scalar: Any, kind: pa.DataType) -> Any:
    if pa.types.is_map(kind):
        return [(_plain(pair[0]), _plain(pair[1])) for pair in scalar.values]
    if pa.types.is_struct(kind):
        return {kind.field(i).name: _plain(scalar[i]) for i in range(kind.num_fields)}
    return [_plain(item) for item in scalar.values]


def _bare_value(scalar: Any, kind: pa.DataType) -> Any:
    if pa.types.is_dictionary(kind):
        return _plain(scalar.value)
    if hasattr(scalar, "as_buffer"):
        return scalar.as_buffer().to_pybytes()
    if pa.types.is_timestamp(kind) and kind.tz not in (None, "UTC"):
        return _plain(scalar.cast(pa.timestamp(kind.unit, "UTC")))
    return scalar.cast(pa.string()).as_py()


def _as_bytes(column: Any, name: str) -> Any:
    """A column of strings as bytes, so that a row of bad UTF-8 costs only itself. KeyError if it is not text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return column.cast(pa.large_binary())
    if not any(getattr(pa.types, kind)(column.type) for kind in _TEXT_KINDS):
        raise KeyError(f"the column {name!r} is {column.type}, not text")
    return column.cast(pa.large_binary())
