"""The documents that a decision is about: all new ones, and of earlier generations those that new ones may be like.

Between phases a document is its number: its place among all documents of all generations, shard after shard. Where it
is decided, it is a node: its place in keep order among those that matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moray.pipelines.dedup.find import Documents, sources_by
from moray.pipelines.dedup.graph import Indices, components
from moray.pipelines.documents import content_hash, read_shard
from moray.pipelines.shards import Row

_OLDER = 1 << 32  # more than there are sources
QUALITY = "quality"  # a column that documents may have: of two that are alike, the better one stays


@dataclass(frozen=True)
class Shards:
    """Files of documents, of all generations in order. firsts: the number of each one's first document."""

    paths: tuple[Path, ...]
    firsts: Indices
    generations: Indices

    @staticmethod
    def of(generations: Sequence[tuple[Sequence[Path], Sequence[int]]]) -> Shards:
        """From (files, documents in each) of each generation."""
        rows = [count for _, counts in generations for count in counts]
        return Shards(
            tuple(path for paths, _ in generations for path in paths),
            np.cumsum([0, *rows[:-1]], dtype=np.int64),
            np.repeat(np.arange(len(generations)), [len(paths) for paths, _ in generations]),
        )

    def rows_of(self, numbers: Indices) -> list[Row]:
        """Which rows of which file, for ascending numbers; `shard` counts the files that are needed."""
        files, starts = np.unique(np.searchsorted(self.firsts, numbers, side="right") - 1, return_index=True)
        ends = [*starts[1:].tolist(), len(numbers)][: len(starts)]
        return [
            {"shard": i, "path": str(self.paths[file]), "rows": (numbers[start:end] - self.firsts[file]).tolist()}
            for i, (file, start, end) in enumerate(zip(files.tolist(), starts.tolist(), ends, strict=True))
        ]

    def generation_of(self, numbers: Indices) -> Indices:
        return self.generations[np.searchsorted(self.firsts, numbers, side="right") - 1]


def read_documents(path: Path, *columns: str) -> pa.Table:
    """What `described` needs of a shard, and these columns; a quality, where an earlier step gave one."""
    known = set(pq.read_schema(path).names) & {QUALITY}
    return read_shard(path, ["id", "text", "source", *columns, *known])


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


def documents_in(table: pa.Table, prefer: Sequence[str]) -> Documents:
    """From columns id, source, hash, quality and length."""
    return Documents(
        ids=_texts(table["id"]),
        hashes=_texts(table["hash"]),
        sources=sources_by(prefer, table["source"].to_pylist()),
        qualities=table["quality"].to_numpy(),
        lengths=table["length"].to_numpy(),
    )


def _texts(column: pa.ChunkedArray) -> npt.NDArray[np.bytes_]:
    """Hexadecimal digits as bytes, a chunk at a time: strings of Python take three times the memory."""
    parts = [np.zeros(0, "S32"), *(np.array(chunk.to_pylist(), "S32") for chunk in column.chunks)]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Nodes:
    """documents: in keep order; numbers: of each."""

    documents: Documents
    numbers: Indices

    @staticmethod
    def of(new: Documents, new_numbers: Indices, old: Documents, old_numbers: Indices, shards: Shards) -> Nodes:
        """All new documents, and some that are older."""
        ages = shards.generation_of(old_numbers) - len(np.unique(shards.generations))
        together = Documents(
            ids=np.concatenate((old.ids, new.ids)),
            hashes=np.concatenate((old.hashes, new.hashes)),
            sources=np.concatenate((old.sources + ages * _OLDER, new.sources)),
            qualities=np.concatenate((old.qualities, new.qualities)),
            lengths=np.concatenate((old.lengths, new.lengths)),
        )
        documents, order = together.in_keep_order()
        return Nodes(documents, np.concatenate((old_numbers, new_numbers))[order])

    def at(self, numbers: Indices) -> Indices:
        """The nodes with these numbers, which must be there; any shape."""
        order = np.argsort(self.numbers)
        found: npt.NDArray[np.int64] = order[np.searchsorted(self.numbers[order], numbers)]
        return found


@dataclass(frozen=True)
class Groups:
    """Documents that are read again, in groups that are compared apart: whoever is in a pair is with its partner.

    numbers: ascending; groups: of each; count: of groups.
    """

    numbers: Indices
    groups: Indices
    count: int

    @staticmethod
    def of(numbers: Indices, pairs: Indices, weights: Indices, most: int) -> Groups:
        """Components of pairs (numbers, [E, 2]), packed one after another into groups of about `most` weight."""
        edges = np.sort(np.searchsorted(numbers, pairs), axis=1)
        labels = components(len(numbers), edges)
        sizes = np.bincount(labels, weights, len(numbers))
        before = np.cumsum(sizes) - sizes  # a component's number is its first document's, so this is in order
        of_label = (before // most).astype(np.int64)
        names, groups = np.unique(of_label[labels], return_inverse=True)
        return Groups(numbers, groups, len(names))

    def rows_of(self, shards: Shards) -> list[Row]:
        """A description for each file that is read."""
        rows = shards.rows_of(self.numbers)
        at = 0
        for row in rows:
            end = at + len(row["rows"])
            row |= {"numbers": self.numbers[at:end].tolist(), "groups": self.groups[at:end].tolist()}
            at = end
        return rows
