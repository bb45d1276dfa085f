"""Priority order: the order that decides, in all dedup steps, which of several duplicates is kept.

A document of an earlier run comes first, then a source named earlier in `prefer`, then the higher quality if an earlier
step has written one, then the longer text, then content hash and id. The order depends on documents only, so the
decisions do not depend on files or workers.

Shapes: N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moray.pipelines.shared.arrays import Indices
from moray.pipelines.shared.documents import QUALITY, content_hash, read_shard
from moray.platform.store.paths import AnyPath, local_file


@dataclass(frozen=True)
class DocumentColumns:
    """Columns [N]. sources: rank by preference, 0 is the highest; negative for documents of earlier runs."""

    ids: npt.NDArray[np.bytes_]
    hashes: npt.NDArray[np.bytes_]
    sources: npt.NDArray[np.int64]
    qualities: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.int64]

    def in_priority_order(self) -> tuple[DocumentColumns, Indices]:
        """The documents in priority order, and the index at which each was."""
        order = np.lexsort((self.ids, self.hashes, -self.lengths, -self.qualities, self.sources))
        return self.take(order), order

    def take(self, places: Indices) -> DocumentColumns:
        return replace(self, **{field.name: getattr(self, field.name)[places] for field in fields(self)})

    def firsts(self) -> Indices:
        """Of documents in priority order, the places of the first document of each text."""
        return np.sort(np.unique(self.hashes, return_index=True)[1])


def sources_by(prefer: Sequence[str], names: Sequence[str]) -> npt.NDArray[np.int64]:
    """The rank of each name in `prefer`; other names share the lowest rank."""
    rank = {source: i for i, source in enumerate(prefer)}
    return np.array([rank.get(name, len(rank)) for name in names], np.int64)


def read_documents(path: AnyPath, *columns: str) -> pa.Table:
    """Reads the columns that `described` uses, and `columns`; the quality only if an earlier step has written one."""
    with local_file(path) as local:
        known = set(pq.read_schema(local).names) & {QUALITY}
        return read_shard(local, ["id", "text", "source", *columns, *known])


def described(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Columns id, source, hash, quality (0 where unknown) and length (in characters), from id, source and text."""
    texts = [text.as_py() for text in table["text"]]
    no_quality = pa.array(np.zeros(len(texts)))
    return {
        "id": table["id"],
        "source": table["source"],
        "hash": pa.array([content_hash(text) for text in texts], pa.string()),
        "quality": table[QUALITY].cast(pa.float64()).fill_null(0.0) if QUALITY in table.column_names else no_quality,
        "length": pa.array([len(text) for text in texts], pa.int64()),
    }


def documents_in(table: pa.Table, prefer: Sequence[str]) -> DocumentColumns:
    """From columns id, source, hash, quality and length."""
    return DocumentColumns(
        ids=_texts(table["id"]),
        hashes=_texts(table["hash"]),
        sources=sources_by(prefer, table["source"].to_pylist()),
        qualities=table["quality"].to_numpy(),
        lengths=table["length"].to_numpy(),
    )


def _texts(column: pa.ChunkedArray) -> npt.NDArray[np.bytes_]:
    """Hexadecimal digits as bytes, a chunk at a time. Python strings take three times the memory."""
    parts = [np.zeros(0, "S32"), *(np.array(chunk.to_pylist(), "S32") for chunk in column.chunks)]
    return np.concatenate(parts)


@dataclass(frozen=True)
class PriorityOrder:
    """All documents of a corpus. table: one row per document, shard after shard. firsts: the row of each shard's first
    document. order: the row of each place in priority order."""

    table: pa.Table
    firsts: Indices
    documents: DocumentColumns
    order: Indices

    @staticmethod
    def of(tables: Sequence[pa.Table], prefer: Sequence[str], earlier: Indices | None = None) -> PriorityOrder:
        """Builds it from the tables of the shards. earlier: [N], orders documents of equal preference, lowest first."""
        table = pa.concat_tables(tables)
        documents = documents_in(table, prefer)
        if earlier is not None and len(earlier):
            ranks = documents.sources * (int(earlier.max()) + 1) + earlier
            documents = replace(documents, sources=ranks)
        documents, order = documents.in_priority_order()
        firsts = np.cumsum([0, *(len(one) for one in tables[:-1])], dtype=np.int64)
        return PriorityOrder(table, firsts, documents, order)

    @property
    def places(self) -> Indices:
        """The place of each row in priority order."""
        places = np.empty(len(self.order), np.int64)
        places[self.order] = np.arange(len(self.order))
        return places

    def ids(self, places: Indices) -> pa.Array:
        """The ids of the documents at these places."""
        return pa.array([name.decode() for name in self.documents.ids[places].tolist()], pa.string())
