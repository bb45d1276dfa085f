"""Readers of row files: JSON lines, Parquet, Arrow, and folders of Hugging Face datasets, which hold any of them.

`Columns` maps a row's columns to a document: text, id, URL, license, and extra columns for `meta`. Memory is bounded
by the longest document, and for Arrow files by the size of the stored batches.
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
    Piece,
    Reject,
    UnrepresentableValue,
    decode_text,
    meta_of,
    printable,
)
from moray.pipelines.corpus.source_file import File, error_text, read_lines, trailing_data, unreadable
from moray.platform.core.errors import InputError

_BATCH_ROWS = 256
_REST_BYTES = 1 << 20  # of a JSON line in addition to its text; longer lines are skipped unread
_TEXT_KINDS = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
_UNREADABLE_ROWS = (pa.ArrowException, OSError, ValueError, OverflowError, SystemError)
LICENSE = "license"  # key in a document's meta, until it is moved to the column of that name


@dataclass(frozen=True)
class Columns:
    """The columns of a row. `id=None`: the id is a JSON line's `id` if it has one, else the row's number."""

    text: str = "text"
    id: str | None = None
    url: str | None = None
    license: str | None = None
    meta: tuple[str, ...] = ()

    def extra(self) -> list[tuple[str, str]]:
        """(name in meta, column) of the columns other than text and id."""
        named = [("url", self.url), (LICENSE, self.license)]
        return [(name, column) for name, column in named if column] + [(name, name) for name in self.meta]

    def required(self) -> list[str]:
        """All columns that a file must have."""
        chosen = [self.text, self.id, *(column for _, column in self.extra())]
        return list(dict.fromkeys(name for name in chosen if name is not None))


def read_jsonl(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """Reads one JSON object per line. `columns` names the text and key fields; the default key is the line number."""
    try:
        stream = file.stream()
    except OSError as error:
        yield unreadable(error)
        return
    limit = 6 * max_bytes + _REST_BYTES  # JSON may encode one byte as six (\u0041)
    with stream:
        numbered = enumerate(read_lines(stream, limit))
        while True:
            try:
                number, line = next(numbered)
            except StopIteration:
                yield from trailing_data(stream)
                return
            except OSError as error:
                yield file.damage(error)
                return
            if line is None:
                yield Reject(f"#{number}", OVERSIZED, f"a line of more than {limit} bytes")
            elif line.strip():
                yield from _json_pieces(line, number, max_bytes, columns)


def _json_pieces(line: bytes, number: int, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """The row's document or a reject, preceded by rejects for other values that cannot be converted."""
    try:
        row = _json(line)
        if not isinstance(row, dict):
            yield Reject(f"#{number}", MALFORMED, "not a JSON object")
            return
        text = row[columns.text]
        named = row.get("id") if columns.id is None else row[columns.id]
        key = printable(f"#{number if named is None else named}")
    except KeyError as error:
        fields = f"; the row has: {', '.join(map(printable, row))}"[:150] if isinstance(row, dict) and row else ""
        yield Reject(f"#{number}", MALFORMED, f"no field {error}{fields}")
        return
    except (ValueError, RecursionError) as error:
        is_array = not number and line.lstrip().startswith(b"[")
        array = "the file is a JSON array; the reader needs one JSON object per line"
        yield Reject(f"#{number}", MALFORMED, array if is_array else error_text(error))
        return
    if text is not None and not isinstance(text, str):
        yield Reject(key, MALFORMED, f"the field {columns.text!r} is {type(text).__name__}, not a string")
        return
    meta, lost = meta_of([(name, row.get(column)) for name, column in columns.extra()])
    yield from (Reject(key, VALUE, reason) for reason in lost)
    yield _numbered(decode_text((text or "").encode("utf-8", "surrogatepass"), max_bytes, key, meta), named is None)


def _json(line: bytes) -> Any:
    """The value of a line. Invalid UTF-8, or a number too long for Python, affects only its own value, not the line."""
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
    """Reads each row as a document. A file that lacks a column counts once as malformed. Each row group that cannot be
    read also counts once; the other row groups are read."""
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
    """The batches of a row group, each with the number of its first row. Unreadable columns other than the text are
    omitted."""
    read = partial(parquet.iter_batches, _BATCH_ROWS, row_groups=[group], use_threads=False)
    row = first
    try:
        for batch in read(columns=columns.required()):
            yield row, batch
            row += batch.num_rows
        return
    except _UNREADABLE_ROWS as error:
        reason = error_text(error)
    bad = {name: problem for name in columns.required() if (problem := _column_error(read, name))}
    if columns.text in bad or not bad:
        yield row, Reject("", MALFORMED, f"from row {row} on: {bad.get(columns.text, reason)}")
        return
    problems = "; ".join(f"{name!r}: {problem}" for name, problem in bad.items())
    yield row, Reject("", VALUE, f"from row {row} on, {problems}")
    at = first
    for batch in read(columns=[name for name in columns.required() if name not in bad]):
        if at >= row:
            yield at, batch
        at += batch.num_rows


def _column_error(read: Callable[..., Iterator[pa.RecordBatch]], column: str) -> str:
    """The error of reading a column of a row group; '' if it can be read."""
    try:
        for _ in read(columns=[column]):
            pass
    except _UNREADABLE_ROWS as error:
        return error_text(error)
    return ""


def read_arrow(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """Reads Arrow's own formats like `read_parquet`: a stream, as `datasets` writes it, or a file."""

    def batches(source: pa.NativeFile) -> Batches:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        _check_columns(reader.schema, columns)
        stored = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
        row = 0
        for batch in stored:
            try:
                _check_batch(batch, columns)
                yield row, batch
            except _UNREADABLE_ROWS as error:
                yield row, Reject("", MALFORMED, f"from row {row} on: {error_text(error)}")
            row += batch.num_rows

    yield from _read_batches(file, batches, max_bytes, columns)


def read_huggingface(file: File, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    """Reads a data file of a dataset folder in the format of its suffix."""
    readers = {".parquet": read_parquet, ".arrow": read_arrow}
    yield from readers.get(file.suffixes[-1], read_jsonl)(file, max_bytes, columns)


def _check_columns(schema: pa.Schema, columns: Columns) -> None:
    """Raises KeyError with a message if a column is missing."""
    if missing := [name for name in columns.required() if name not in schema.names]:
        raise KeyError(f"no column {missing[0]!r}; the file has: {', '.join(schema.names)}")


def _check_batch(batch: pa.RecordBatch, columns: Columns) -> None:
    """Raises ArrowInvalid if a column has offsets outside its buffers, which Arrow does not check on reading.

    Strings are validated as bytes, also inside nested types, because invalid UTF-8 must not cost a row.
    """
    for name in columns.required():
        column = batch.column(name)
        if pa.types.is_dictionary(column.type):
            dictionary = column.dictionary.view(_with_bytes(column.dictionary.type))
            column = pa.DictionaryArray.from_arrays(column.indices, dictionary, safe=False)
        column.view(_with_bytes(column.type)).validate(full=True)


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with binary in place of string, also when nested."""
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(_with_bytes(kind.field(i).type)) for i in range(kind.num_fields)])
    if pa.types.is_map(kind):
        return pa.map_(_with_bytes(kind.key_type), _with_bytes(kind.item_type))
    for is_kind, made in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if is_kind(kind):
            return made(kind.value_field.with_type(_with_bytes(kind.value_type)))
    return {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(kind, kind)


def _read_batches(
    file: File, batches: Callable[[pa.NativeFile], Batches], max_bytes: int, columns: Columns
) -> Iterator[Piece]:
    """Documents of the batches that `batches` reads from the open file. Any other error ends the file with a reject."""
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
        except Exception as error:  # a torn file can cause errors of any type
            problem = _message(error)
            yield Reject("", MALFORMED, f"from row {number} on: {problem}" if number else problem)


def _message(error: Exception) -> str:
    return str(error.args[0])[:200] if isinstance(error, KeyError) else error_text(error)


def _pieces(batch: pa.RecordBatch, first: int, max_bytes: int, columns: Columns) -> Iterator[Piece]:
    texts = _as_bytes(batch.column(columns.text), columns.text)
    present, nulls = set(batch.schema.names), [None] * batch.num_rows
    names = values(batch.column(columns.id)) if columns.id in present else nulls
    extra = columns.extra()
    extra_values = [values(batch.column(column)) if column in present else nulls for _, column in extra]
    for i, (text, name) in enumerate(zip(texts, names, strict=True)):
        named = (
            None
            if isinstance(name, UnrepresentableValue)
            else name.decode(errors="replace")
            if isinstance(name, bytes)
            else name
        )
        key = printable(f"#{first + i if named is None else named}")
        meta, lost = meta_of(
            [(key_in_meta, column[i]) for (key_in_meta, _), column in zip(extra, extra_values, strict=True)]
        )
        if isinstance(name, UnrepresentableValue):
            lost.append(f"cannot convert the value of {columns.id!r}: {name.reason}")
        yield from (Reject(key, VALUE, reason) for reason in lost)
        yield _numbered(decode_text(text.as_py() or b"", max_bytes, key, meta), named is None)


def values(column: pa.Array) -> list[Any]:
    """A column as Python values. A value that Python cannot represent becomes Arrow's text for it, or else an
    `UnrepresentableValue`."""
    try:
        return list(column.to_pylist())
    except Exception:  # dates before the year 1 or after 9999, unknown time zones, invalid UTF-8, nanoseconds
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return _plain(scalar)
    except Exception as error:
        return UnrepresentableValue(error_text(error))


def _plain(scalar: Any) -> Any:
    """One value, converted part by part if it cannot be converted as a whole. Raises Arrow's errors."""
    try:
        return scalar.as_py()
    except Exception:
        kind = scalar.type
        return _parts(scalar, kind) if pa.types.is_nested(kind) else _raw_value(scalar, kind)


def _parts(scalar: Any, kind: pa.DataType) -> Any:
    if pa.types.is_map(kind):
        return [(_plain(pair[0]), _plain(pair[1])) for pair in scalar.values]
    if pa.types.is_struct(kind):
        return {kind.field(i).name: _plain(scalar[i]) for i in range(kind.num_fields)}
    return [_plain(item) for item in scalar.values]


def _raw_value(scalar: Any, kind: pa.DataType) -> Any:
    if pa.types.is_dictionary(kind):
        return _plain(scalar.value)
    if hasattr(scalar, "as_buffer"):
        return scalar.as_buffer().to_pybytes()
    if pa.types.is_timestamp(kind) and kind.tz not in (None, "UTC"):
        return _plain(scalar.cast(pa.timestamp(kind.unit, "UTC")))
    return scalar.cast(pa.string()).as_py()


def _as_bytes(column: Any, name: str) -> Any:
    """A string column as bytes, so that invalid UTF-8 costs only its own row. Raises KeyError if it is not text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return column.cast(pa.large_binary())
    if not any(getattr(pa.types, kind)(column.type) for kind in _TEXT_KINDS):
        raise KeyError(f"the column {name!r} is {column.type}, not text")
    return column.cast(pa.large_binary())
