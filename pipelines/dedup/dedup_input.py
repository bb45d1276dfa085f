"""The input of one dedup run: its own documents, and the indexes and documents of earlier runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from moray.pipelines.dedup import dedup_index
from moray.pipelines.dedup.dedup_index import Representatives
from moray.pipelines.dedup.sketches import Sketches
from moray.pipelines.shared.arrays import Indices
from moray.pipelines.shared.documents import shard_sizes
from moray.pipelines.shared.shards import Row
from moray.platform.plan.context import StepContext
from moray.platform.plan.fingerprint import EARLIER
from moray.platform.store.paths import AnyPath, in_threads, open_ranges

if TYPE_CHECKING:
    from moray.pipelines.dedup.config import DedupConfig


@dataclass(frozen=True)
class NumberedShards:
    """Document shards of all generations, in order. firsts: the number of each shard's first document."""

    paths: tuple[AnyPath, ...]
    firsts: Indices
    generations: Indices

    @staticmethod
    def of(generations: Sequence[tuple[Sequence[AnyPath], Sequence[int]]]) -> NumberedShards:
        """Builds it from (files, documents per file) of each generation."""
        rows = [count for _, counts in generations for count in counts]
        return NumberedShards(
            tuple(path for paths, _ in generations for path in paths),
            np.cumsum([0, *rows[:-1]], dtype=np.int64),
            np.repeat(np.arange(len(generations)), [len(paths) for paths, _ in generations]),
        )

    def rows_of(self, numbers: Indices) -> list[Row]:
        """A task description for each file that contains any of `numbers`, which are ascending.

        The numbers of a file are numbers[begin:end]. age: 0 for the last generation, -1 for the one before it, and so
        on.
        """
        bounds = np.searchsorted(numbers, [*self.firsts.tolist(), np.iinfo(np.int64).max])
        files = np.flatnonzero(np.diff(bounds)).tolist()
        age = int(self.generations.max(initial=0))
        return [
            {
                "shard": i,
                "path": str(self.paths[file]),
                "first": int(self.firsts[file]),
                "age": int(self.generations[file]) - age,
                "begin": int(bounds[file]),
                "end": int(bounds[file + 1]),
            }
            for i, file in enumerate(files)
        ]


@dataclass(frozen=True)
class DedupInput:
    """paths, sizes, rows: shards of this run's documents, their sizes in bytes, and documents per shard. shards: those
    of all runs."""

    reference: str
    paths: tuple[AnyPath, ...]
    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    earlier: list[dedup_index.Earlier]
    shards: NumberedShards
    representatives: Representatives

    @staticmethod
    def of(ctx: StepContext[DedupConfig]) -> DedupInput:
        folder = ctx.inputs["documents"].location
        sizes = shard_sizes(folder)
        paths = tuple(folder / name for name in sizes)
        rows = tuple(in_threads(_row_count, paths))
        earlier = _earlier(ctx)
        generations = [([one.texts / name for name in one.generation.shards], one.generation.rows) for one in earlier]
        known = [] if ctx.config.index_form == "bloom" else earlier
        return DedupInput(
            ctx.inputs["documents"].reference,
            paths,
            tuple(sizes.values()),
            rows,
            earlier,
            NumberedShards.of([*generations, (paths, rows)]),
            Representatives.read(known),
        )

    @property
    def count(self) -> int:
        return sum(self.rows)

    @property
    def offset(self) -> int:
        """The number of this run's first document: documents of all runs are numbered consecutively."""
        return sum(one.generation.count for one in self.earlier)

    @property
    def ranges(self) -> int:
        return dedup_index.index_ranges(self.count)

    @property
    def own_firsts(self) -> tuple[int, ...]:
        """The number of the first document of each of this run's shards."""
        return tuple(self.shards.firsts[len(self.shards.firsts) - len(self.paths) :].tolist())

    def sketches(self, folder: AnyPath) -> Sketches:
        return Sketches(folder, tuple(path.stem for path in self.paths), self.own_firsts, self.ranges)

    def generation(self) -> dedup_index.Generation:
        names = tuple(path.name for path in self.paths)
        return dedup_index.Generation(self.reference, self.offset, names, self.rows, self.ranges)


def _earlier(ctx: StepContext[DedupConfig]) -> list[dedup_index.Earlier]:
    """The generations of earlier runs, oldest first."""
    found, link = [], ctx.inputs.get(EARLIER)
    while link is not None:
        generation = dedup_index.Generation.read(link.location)
        texts = ctx.artifact(generation.documents)
        found.append(dedup_index.Earlier(generation, link.location, texts.location))
        previous = link.manifest.inputs.get(EARLIER)
        link = ctx.artifact(previous) if previous else None
    return found[::-1]


def _row_count(path: AnyPath) -> int:
    with open_ranges(path) as file:
        return int(pq.read_metadata(file).num_rows)
