"""Reads lists of token ids from Parquet and Arrow files, as Hugging Face's `datasets` writes them: a row is a document.

Parquet is read page by page, Arrow files on this machine are memory-mapped. So memory is bounded by the longest
document, except for an Arrow file in a bucket, which needs the memory of its largest record batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moray.pipelines.corpus.source_file import File, error_text
from moray.pipelines.shared.arrays import Indices
from moray.pipelines.tokenize.pretokenized.stored_ids import LARGEST_DOCUMENT, READ_BYTES, StoredIds
from moray.platform.core.errors import InputError, nearest

_BUFFER = 1 << 20  # bytes of a Parquet column read at once
_ID_BYTES = 8  # at most
_MOST_ROWS = 1 << 16
_UNREADABLE = (pa.ArrowException, OSError, ValueError, SystemError)


def row_group_tokens(file: File, column: str) -> list[int]:
    """The number of ids in each row group of a Parquet file. Raises InputError if it has no such column of ids."""
    with _reported(file), _opened(file) as opened, pq.ParquetFile(opened) as parquet:
        _check_column(file, parquet.schema_arrow, column)
        metadata = parquet.metadata
        leaf = next(n for n in range(metadata.num_columns) if metadata.schema.column(n).path.split(".")[0] == column)
        return [metadata.row_group(n).column(leaf).num_values for n in range(metadata.num_row_groups)]


def check_arrow(file: File, column: str) -> None:
    """Raises InputError if an Arrow file has no such column of ids."""
    with _reported(file), _opened(file) as opened:
        _check_column(file, _arrow_reader(opened).schema, column)


def read_row_groups(file: File, column: str, first: int, last: int) -> Iterator[StoredIds]:
    """The rows of the row groups [first, last) of a Parquet file. Raises InputError for damage."""
    with _reported(file), _opened(file) as opened, pq.ParquetFile(opened, buffer_size=_BUFFER) as parquet:
        groups = [parquet.metadata.row_group(n) for n in range(last)]
        row = sum(group.num_rows for group in groups[:first])
        for number, group in enumerate(groups[first:], first):
            rows = _MOST_ROWS
            if group.num_rows:
                rows = int(np.clip(READ_BYTES * group.num_rows // max(1, group.total_byte_size), 1, _MOST_ROWS))
            for batch in parquet.iter_batches(rows, row_groups=[number], columns=[column], use_threads=False):
                yield from _stored(file, row, batch.column(0))
                row += batch.num_rows


def read_arrow_ids(file: File, column: str) -> Iterator[StoredIds]:
    """The rows of an Arrow stream, as `datasets` writes it, or of an Arrow file. Raises InputError for damage."""
    with _reported(file), _opened(file) as opened:
        reader = _arrow_reader(opened)
        at = _check_column(file, reader.schema, column)
        is_file = isinstance(reader, pa.RecordBatchFileReader)
        batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else reader
        row = 0
        for batch in batches:
            yield from _stored(file, row, batch.column(at))
            row += batch.num_rows


def _stored(file: File, row: int, column: pa.Array) -> Iterator[StoredIds]:
    """The lists of a column, about READ_BYTES at a time. row: number of the first one. A missing list has no ids."""
    ends = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy())]).astype(np.int64)
    if (largest := int(np.diff(ends).max(initial=0))) > LARGEST_DOCUMENT:
        raise InputError(
            f"{file.location}: document {row + int(np.diff(ends).argmax())} has {largest} ids; the most is "
            f"{LARGEST_DOCUMENT}",
            "write a row for each document",
        )
    at = 0
    while at < len(column):
        end = max(at + 1, int(np.searchsorted(ends, ends[at] + READ_BYTES // _ID_BYTES, side="right")) - 1)
        values = column.slice(at, end - at).flatten()
        bounds: Indices = ends[at : end + 1] - ends[at]
        if values.null_count:
            missing = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            n = int(np.searchsorted(bounds, missing, side="right")) - 1
            raise InputError(
                f"{file.location}: document {row + at + n}, position {missing - int(bounds[n])}: the id is missing",
                "write the ids again, without null",
            )
        yield StoredIds(row + at, values.to_numpy(), bounds)
        at = end


def _check_column(file: File, schema: pa.Schema, column: str) -> int:
    """The number of the column. Raises InputError unless it has lists of integers."""
    if schema.get_field_index(column) < 0:
        raise InputError(
            f"{file.location} has no column {column!r}",
            f"set `column`: {nearest(column, schema.names)}" if schema.names else "exclude the file",
        )
    kind = schema.field(column).type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not (lists and pa.types.is_integer(kind.value_type)):
        raise InputError(
            f"{file.location}: the column {column!r} is {kind}, not a list of integers",
            "set `column` to the column with the token ids; text needs the step `corpus`",
        )
    return int(schema.get_field_index(column))


def _arrow_reader(opened: pa.NativeFile) -> Any:
    is_file = opened.read(6) == b"ARROW1"
    opened.seek(0)
    return pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)


def _opened(file: File) -> pa.NativeFile:
    if file.is_object:
        return file.open()
    try:
        return pa.memory_map(file.location)
    except UnicodeError:  # Arrow's own files accept only UTF-8 names
        return file.open()


@contextlib.contextmanager
def _reported(file: File) -> Iterator[None]:
    """Raises an InputError that names the file for every error of Arrow."""
    try:
        yield
    except _UNREADABLE as error:
        raise InputError(
            f"{file.location} cannot be read: {error_text(error)}", "copy it again, or exclude it"
        ) from error
