"""One task of `corpus`: reads some files of one source, and writes their documents and rejects.

Both output files are written batch by batch, so that memory holds one batch. `rejected-NNNNN.parquet` gets its final
name last and carries the counts. If it exists, the shard is complete and a rerun reuses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moray.pipelines.corpus.pieces import REASONS, REPEATED_ID, Document, Meta, Piece, Reject
from moray.pipelines.corpus.readers import READERS
from moray.pipelines.corpus.rows import LICENSE, Columns
from moray.pipelines.corpus.source_file import File, bytes_read
from moray.pipelines.shared.documents import SCHEMA, document_id, parquet_writer, shard_name
from moray.pipelines.shared.shards import Row
from moray.platform.core.errors import InputError
from moray.platform.store.paths import AnyPath, in_threads, list_files, open_ranges

REJECTS = pa.schema([(name, pa.string()) for name in ("source", "key", "reason", "detail")])
_BATCH_BYTES = 32_000_000  # of text that a task buffers before writing
_BATCH_ROWS = 100_000
_COUNTS = b"moray.counts"
_PROGRESS_FILES = 256  # read once a second


def rejects_name(number: int) -> str:
    return f"rejected-{number:05d}.parquet"


def write_corpus_shard(shard: Row, folder: AnyPath, max_bytes: int) -> Row:
    """Reads one shard's files and writes its Parquet files, unless they exist. Runs in a Ray worker."""
    rejected = folder / rejects_name(shard["shard"])
    if not rejected.exists():
        with (
            parquet_writer(rejected, REJECTS) as rejects,
            parquet_writer(folder / shard_name(shard["shard"]), SCHEMA) as documents,
        ):
            batch, progress = (
                _Batch(shard, documents, rejects),
                _Progress(folder / _progress_name(shard["shard"])),
            )
            for key, file in _files(shard):
                _read_file(batch, key, file, max_bytes, progress)
                progress.before += file.size
            batch.write()
            progress.end()
            rejects.add_key_value_metadata({_COUNTS.decode(): json.dumps(batch.counts)})
    with open_ranges(rejected) as written:
        counts = json.loads(pq.read_metadata(written).metadata[_COUNTS])
    return {"shard": shard["shard"], **counts}


def _files(shard: Row) -> list[tuple[str, File]]:
    columns = (shard[name] for name in ("keys", "files", "sizes", "etags"))
    rows = zip(*columns, strict=True)
    return [(key, File(os.fsdecode(location), size, etag, shard["root"])) for key, location, size, etag in rows]


def _progress_name(number: int) -> str:
    return f".reading-{number:05d}"


def bytes_in_progress(folder: AnyPath) -> int:
    """Bytes that unfinished tasks have read so far. On a very large cluster, those of some of the tasks."""
    names = list(list_files(folder, ".reading-*"))[:_PROGRESS_FILES]
    return sum(in_threads(lambda name: _bytes_read(folder / name), names))


def _bytes_read(path: AnyPath) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # the task has just finished
        return 0


def remove_progress_files(folder: AnyPath) -> None:
    """Removes the progress files of killed tasks, which are no part of the result."""
    for name in list_files(folder, ".reading-*"):
        (folder / name).unlink(missing_ok=True)


class _Progress:
    """Writes to a small file, once a second, how many bytes of a shard are read. A single file may take an hour."""

    def __init__(self, path: AnyPath) -> None:
        self._path = path
        self._last = time.monotonic()
        self.before = 0  # bytes of the finished files

    def update(self) -> None:
        if time.monotonic() - self._last > 1:
            self._last = time.monotonic()
            with contextlib.suppress(OSError, InputError):  # missing progress does no harm
                self._path.write_text(str(self.before + bytes_read()))

    def end(self) -> None:
        self._path.unlink(missing_ok=True)


def _read_file(batch: _Batch, key: str, file: File, max_bytes: int, progress: _Progress) -> None:
    shard = batch.shard
    columns = Columns(**{**json.loads(shard["columns"]), "meta": tuple(json.loads(shard["columns"])["meta"])})
    # Keys within the file. Later steps cannot distinguish two documents with the same id.
    seen: dict[str, bool] = {}
    try:
        for piece in READERS[shard["reader"]](file, max_bytes, columns):
            batch.add(key, _with_unique_key(piece, seen) if isinstance(piece, Document) else piece)
            progress.update()
    except InputError:
        raise
    except Exception as error:
        raise RuntimeError(f"{shard['source']}/{key}, {_position(seen)}: {type(error).__name__}: {error}") from error


def _with_unique_key(piece: Document, seen: dict[str, bool]) -> Piece:
    """The document, or a reject if its id is repeated.

    A row number that equals another row's id is not a repetition: the later document gets a key that says whether it is
    a row number or an id.
    """
    if seen.get(piece.key, piece.numbered) != piece.numbered:
        piece = piece._replace(key=f"#{'row' if piece.numbered else 'id'} {piece.key[1:]}")
    if piece.key in seen:
        return Reject(piece.key, REPEATED_ID)
    seen[piece.key] = piece.numbered
    return piece


def _position(seen: dict[str, bool]) -> str:
    return f"after document {next(reversed(seen))!r}" if seen else "before its first document"


class _Batch:
    """Documents and rejects that are not yet written, and the counts of everything read."""

    def __init__(self, shard: Row, documents: pq.ParquetWriter, rejects: pq.ParquetWriter) -> None:
        self.shard = shard
        self.counts: Counter[str] = Counter({name: 0 for name in ("documents", "bytes", *map(_dropped, REASONS))})
        self._license_in_meta = json.loads(shard["columns"])["license"] is not None
        self._writers = documents, rejects
        self._documents: list[tuple[str, str, str, list[tuple[str, str]]]] = []  # key, text, license, meta
        self._rejects: list[tuple[str, str, str]] = []  # key, reason, detail
        self._bytes = 0

    def add(self, key: str, piece: Piece) -> None:
        if isinstance(piece, Reject):
            self.counts[_dropped(piece.reason)] += 1
            self._rejects.append((key + piece.key, piece.reason, piece.detail))
        else:
            size = len(piece.text.encode())
            self.counts.update({"documents": 1, "bytes": size})
            license, meta = self._split_license(piece.meta)
            named = [(name, value) for name, value in meta if name != "path"]
            self._documents.append((key + piece.key, piece.text, license, [("path", key + piece.key), *named]))
            self._bytes += size
        if self._bytes >= _BATCH_BYTES or len(self._documents) + len(self._rejects) >= _BATCH_ROWS:
            self.write()

    def _split_license(self, meta: Meta) -> tuple[str, Meta]:
        """The document's license, and its other metadata. The license column precedes other entries of that name."""
        own = dict(reversed(meta)).get(LICENSE) if self._license_in_meta else None
        if own is None:
            return str(self.shard["license"]), meta
        return own, tuple(pair for pair in meta if pair[0] != LICENSE)

    def write(self) -> None:
        source = self.shard["source"]
        keys, texts, licenses, metas = zip(*self._documents, strict=True) if self._documents else ((), (), (), ())
        ids = [document_id(source, key) for key in keys]
        columns: list[Any] = [ids, texts, [source] * len(keys), licenses, metas]
        self._writers[0].write_table(_table(columns, SCHEMA))
        if self._rejects:
            rejected: list[Any] = [[source] * len(self._rejects), *zip(*self._rejects, strict=True)]
            self._writers[1].write_table(_table(rejected, REJECTS))
        self._documents, self._rejects, self._bytes = [], [], 0


def _table(columns: list[Any], schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def _dropped(reason: str) -> str:
    return f"dropped:{reason}"
