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

from moray.pipelines.dedup.find import Documents, sources_by
from moray.pipelines.dedup.graph import Indices
from moray.pipelines.dedup.signatures import Keys
from moray.pipelines.documents import read_shard
from moray.pipelines.shards import Row

_OLDER = 1 << 32  # more than there are sources


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
        files = np.searchsorted(self.firsts, numbers, side="right") - 1
        return [
            {"shard": i, "path": str(self.paths[file]), "rows": (numbers[files == file] - self.firsts[file]).tolist()}
            for i, file in enumerate(np.unique(files).tolist())
        ]

    def generation_of(self, numbers: Indices) -> Indices:
        return self.generations[np.searchsorted(self.firsts, numbers, side="right") - 1]


def documents_in(table: pa.Table, prefer: Sequence[str]) -> Documents:
    """From columns id, source, hash and length."""
    return Documents(
        ids=np.array(table["id"].to_pylist(), "S32"),
        hashes=np.array(table["hash"].to_pylist(), "S32"),
        sources=sources_by(prefer, table["source"].to_pylist()),
        lengths=table["length"].to_numpy(),
    )


@dataclass(frozen=True)
class Reread:
    """Documents that were read again: what they are, by ascending number, and [begin, end) of each one's shingles."""

    numbers: Indices
    documents: Documents
    bounds: Indices
    sets: Keys

    @staticmethod
    def of(numbers: Indices, files: Sequence[Path], prefer: Sequence[str]) -> Reread:
        tables, bounds, sets, at = [], [np.zeros((0, 2), np.int64)], [np.zeros(0, np.uint64)], 0
        for path in files:
            table = read_shard(path).combine_chunks()
            lists = table["shingles"].combine_chunks()
            ends = at + (lists.offsets.to_numpy() - lists.offsets[0].as_py())
            bounds.append(np.stack((ends[:-1], ends[1:]), axis=1))
            sets.append(lists.flatten().to_numpy())
            at = int(ends[-1])
            tables.append(table.drop_columns(["shingles"]))
        documents = documents_in(pa.concat_tables(tables), prefer) if tables else _no_documents()
        return Reread(numbers, documents, np.concatenate(bounds), np.concatenate(sets))


def _no_documents() -> Documents:
    nothing = np.zeros(0, np.int64)
    return Documents(np.zeros(0, "S32"), np.zeros(0, "S32"), nothing, nothing)


@dataclass(frozen=True)
class Nodes:
    """documents: in keep order; numbers: of each; bounds: of each one's shingles in `sets`, none where never read."""

    documents: Documents
    numbers: Indices
    bounds: Indices
    sets: Keys

    @staticmethod
    def of(new: Documents, new_numbers: Indices, read: Reread, shards: Shards) -> Nodes:
        """All new documents, and those that were read and are older."""
        old = np.flatnonzero(read.numbers < new_numbers.min()) if len(new_numbers) else np.arange(len(read.numbers))
        older = read.documents.take(old)
        ages = shards.generation_of(read.numbers[old]) - len(np.unique(shards.generations))
        together = Documents(
            ids=np.concatenate((older.ids, new.ids)),
            hashes=np.concatenate((older.hashes, new.hashes)),
            sources=np.concatenate((older.sources + ages * _OLDER, new.sources)),
            lengths=np.concatenate((older.lengths, new.lengths)),
        )
        documents, order = together.in_keep_order()
        numbers = np.concatenate((read.numbers[old], new_numbers))[order]
        bounds = np.zeros((len(numbers), 2), np.int64)
        nodes = Nodes(documents, numbers, bounds, read.sets)
        bounds[nodes.at(read.numbers)] = read.bounds
        return nodes

    def at(self, numbers: Indices) -> Indices:
        """The nodes with these numbers, which must be there; any shape."""
        order = np.argsort(self.numbers)
        found: npt.NDArray[np.int64] = order[np.searchsorted(self.numbers[order], numbers)]
        return found
