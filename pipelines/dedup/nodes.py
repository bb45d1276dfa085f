"""Documents as they are read, and those that a decision is about: who may be like another, of all generations.

Between phases a document is its number: its place among all documents of all generations, shard after shard.
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
from moray.pipelines.shared.documents import content_hash, read_shard
from moray.pipelines.shared.shards import Row

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
        """A description of each file that has any of ascending numbers, which are its `begin` to `end`; `age`: 0 of the
        last generation, less than 0 of those before."""
        bounds = np.searchsorted(numbers, [*self.firsts.tolist(), np.iinfo(np.int64).max])
        files = np.flatnonzero(np.diff(bounds)).tolist()
        age = int(self.generations.max(initial=0))
        return [
            {
                "shard": i, "path": str(self.paths[file]), "first": int(self.firsts[file]),
                "age": int(self.generations[file]) - age, "begin": int(bounds[file]), "end": int(bounds[file + 1]),
            }
            for i, file in enumerate(files)
        ]  # fmt: skip


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
class Groups:
    """Documents that are read again, in groups that are compared apart: whoever is in a pair is with its partner.

    groups: of each; count: of groups; components, largest: how many there are, and documents in the largest.
    """

    groups: npt.NDArray[np.int32]
    count: int
    components: int
    largest: int

    @staticmethod
    def of(numbers: Indices, pairs: Indices, weights: Indices, most: int) -> Groups:
        """Components of pairs (numbers, [E, 2]), packed one after another into groups of about `most` weight."""
        edges = np.sort(np.searchsorted(numbers, pairs), axis=1)
        labels = components(len(numbers), edges)
        if (labels[edges[:, 0]] != labels[edges[:, 1]]).any():
            raise RuntimeError("a pair of documents is in two components")
        sizes = np.bincount(labels, weights, len(numbers))
        before = np.cumsum(sizes) - sizes  # a component's number is its first document's, so this is in order
        of_label = (before // most).astype(np.int64)
        names, groups = np.unique(of_label[labels], return_inverse=True)
        members = np.bincount(labels, minlength=1)
        return Groups(groups.astype(np.int32), len(names), int((members > 0).sum()), int(members.max()))
