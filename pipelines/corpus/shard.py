"""One task of `corpus`: reads some files of one source, writes their documents and what was left out.

Both files are written as they come, so that memory holds one batch. `rejected-NNNNN.parquet` is the last to get its
name and carries the counts: where it is, the shard is done, and a rerun takes it as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moray.pipelines.corpus.files import File
from moray.pipelines.corpus.pieces import REASONS, REPEATED_ID, Document, Meta, Piece, Reject
from moray.pipelines.corpus.readers import READERS
from moray.pipelines.corpus.rows import LICENSE, Columns
from moray.pipelines.documents import SCHEMA, document_id, parquet_writer, shard_name
from moray.pipelines.shards import Row

REJECTS = pa.schema([(name, pa.string()) for name in ("source", "key", "reason", "detail")])
_BATCH_BYTES = 32_000_000  # of text held by a task before it is written
_BATCH_ROWS = 100_000
_COUNTS = b"moray.counts"


def rejects_name(number: int) -> str:
    return f"rejected-{number:05d}.parquet"


def write_corpus_shard(shard: Row, folder: str, max_bytes: int) -> Row:
    """Reads one shard's files and writes its Parquet files, unless they are there. Runs in a Ray worker."""
    rejected = Path(folder) / rejects_name(shard["shard"])
    if not rejected.exists():
        with (
            parquet_writer(rejected, REJECTS) as rejects,
            parquet_writer(Path(folder) / shard_name(shard["shard"]), SCHEMA) as documents,
        ):
            batch = _Batch(shard, documents, rejects)
            for key, file in _files(shard):
                _read_file(batch, key, file, max_bytes)
            batch.write()
            rejects.add_key_value_metadata({_COUNTS.decode(): json.dumps(batch.counts)})
    counts = json.loads(pq.read_metadata(rejected).metadata[_COUNTS])
    return {"shard": shard["shard"], **counts}


def _files(shard: Row) -> list[tuple[str, File]]:
    columns = (shard[name] for name in ("keys", "files", "sizes", "etags"))
    rows = zip(*columns, strict=True)
    return [(key, File(place, size, etag, shard["root"])) for key, place, size, etag in rows]


def _read_file(batch: _Batch, key: str, file: File, max_bytes: int) -> None:
    shard = batch.shard
    columns = Columns(**{**json.loads(shard["columns"]), "meta": tuple(json.loads(shard["columns"])["meta"])})
    seen: set[str] = set()  # keys within the file: two documents of one id could not be told apart later
    for piece in READERS[shard["reader"]](file, max_bytes, columns):
        if isinstance(piece, Document) and piece.key in seen:
            piece = Reject(piece.key, REPEATED_ID)  # noqa: PLW2901
        elif isinstance(piece, Document):
            seen.add(piece.key)
        batch.add(key, piece)


class _Batch:
    """What was read and is not yet written, and the counts of all that was read."""

    def __init__(self, shard: Row, documents: pq.ParquetWriter, rejects: pq.ParquetWriter) -> None:
        self.shard = shard
        self.counts: Counter[str] = Counter({name: 0 for name in ("documents", "bytes", *map(_dropped, REASONS))})
        self._license_in_meta = json.loads(shard["columns"])["license"] is not None
        self._writers = documents, rejects
        self._documents: list[tuple[str, str, str, list[tuple[str, str]]]] = []  # key, text, licence, meta
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
        """The document's licence, and its other metadata: a column for the licence comes first of that name."""
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
