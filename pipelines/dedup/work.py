"""The phases of dedup, as tasks that leave files in `.work`, and what this process does between them.

Every shard is signed; every range of hashes is searched for copies; every range of every band is compared, which gives
pairs. Components of pairs are told from their forests, and packed into groups. The documents in them, and only they,
are read again, and every group is decided by itself. Last, every shard is written without what goes, and beside it what
goes, with which document stays in its place.

Text is in tasks, but for that of few candidates. This process holds a byte of each document (whether it is compared),
and some 100 of each that is in a pair. Phases of few documents are done here: that is sooner than tasks begin.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.dedup import index
from moray.pipelines.dedup.compare import compare_keys, merge_forests, read_forests, seen_keys_path
from moray.pipelines.dedup.config import DedupConfig
from moray.pipelines.dedup.crawl import Crawl
from moray.pipelines.dedup.decide import (
    GroupRules,
    decide_group,
    decided_path,
    group_pairs,
    groups_path,
    numbers_path,
    read_again,
    read_decided,
    write_decided,
)
from moray.pipelines.dedup.exact import Kept, copies_path, find_copies, originals_path, seen_hashes_path
from moray.pipelines.dedup.groups import Groups
from moray.pipelines.dedup.sign import sign_shard
from moray.pipelines.dedup.sketches import Sketches
from moray.pipelines.dedup.write import REMOVED, clusters, write_kept
from moray.pipelines.shared.arrays import Indices, save_array
from moray.pipelines.shared.documents import write_parquet
from moray.pipelines.shared.shards import Row, map_shards
from moray.platform.plan.context import StepContext

_FOLDER = ".work"
_GROUP_CHARACTERS = 50_000_000  # of documents that a worker compares at once: some 400 MB of shingles at the most
_FILE_PAIRS = 20_000_000  # that are parted by group at once
_EDGES = 100_000_000  # of forests: of more, some are merged by others before this process joins them
_MERGED = 16  # forests at once
_FEW_DOCUMENTS = 1 << 18  # that are compared here
_FEW_BYTES = 10_000_000  # of files that are read again here


@dataclass(frozen=True)
class Copied:
    """old: numbers of earlier documents whose text some are; seen: numbers of those whose text a filter has seen."""

    old: Indices
    seen: Indices


@dataclass(frozen=True)
class Compared:
    """files: how many pairs are in each; edges: of a forest of all; seen: numbers of those whose key a filter has seen;
    capped: keys that so many share that not all their pairs are looked at."""

    files: list[int]
    edges: Indices
    seen: Indices
    capped: int


@dataclass(frozen=True)
class Decided:
    """table: rows of decide.DECIDED, by number; pairs: that were candidates, alike: that were."""

    table: pa.Table
    pairs: int
    alike: int


@dataclass(frozen=True)
class Work:
    ctx: StepContext[DedupConfig]
    crawl: Crawl
    folder: Path
    sketches: Sketches
    kept: Kept

    @staticmethod
    def of(ctx: StepContext[DedupConfig]) -> Work:
        crawl, folder = Crawl.of(ctx), ctx.folder / _FOLDER
        folder.mkdir(exist_ok=True)
        kept = Kept(ctx.config.index_form if ctx.config.index else "", str(ctx.folder), crawl.earlier)
        return Work(ctx, crawl, folder, crawl.sketches(folder / "sketches"), kept)

    def sign(self) -> None:
        sign = partial(
            sign_shard, folder=self.sketches.folder, shingling=self.ctx.config.shingling, prefer=self.ctx.config.prefer
        )
        map_shards(self.ctx, "signing", self._shards(), sign, "bytes", lambda row: row["size"])

    def find_copies(self) -> Copied:
        """Besides, writes who is compared: the first document of each text."""
        find = partial(find_copies, folder=str(self.folder), sketches=self.sketches, kept=self.kept)
        ranges: list[Row] = [{"shard": part} for part in range(self.crawl.ranges)]
        map_shards(self.ctx, "finding copies", ranges, find, "ranges", lambda row: 1, here=self._few)
        members = np.ones(self.crawl.count, np.bool_)
        old, seen = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for part in range(self.crawl.ranges):
            members[np.load(copies_path(self.folder, part)) - self.crawl.offset] = False
            seen.append(np.load(seen_hashes_path(self.folder, part)))
            originals = np.unique(np.load(originals_path(self.folder, part), mmap_mode="r")["number"])
            old.append(originals[originals < self.crawl.offset])
        members[np.concatenate(seen) - self.crawl.offset] = False
        save_array(self._members, members)
        return Copied(np.concatenate(old), np.concatenate(seen))

    def compare(self) -> Compared:
        compare = partial(
            compare_keys, folder=str(self.folder), sketches=self.sketches, members=str(self._members),
            offset=self.crawl.offset, kept=self.kept,
        )  # fmt: skip
        bands, ranges = self.ctx.config.shingling.bands, self.crawl.ranges
        parts: list[Row] = [
            {"shard": band * ranges + part, "band": band, "range": part}
            for band in range(bands)
            for part in range(ranges)
        ]
        rows = map_shards(self.ctx, "comparing", parts, compare, "ranges", lambda row: 1, here=self._few)
        seen = [np.load(seen_keys_path(self.folder, row["shard"])) for row in rows if row["seen"]]
        known = np.unique(np.concatenate([np.zeros(0, np.int64), *seen]))
        capped = sum(row["capped"] for row in rows)
        return Compared([row["pairs"] for row in rows], self._joined(rows), known, capped)

    def _joined(self, rows: Sequence[Row]) -> Indices:
        """The edges of all forests, merged in a tree until they are few."""
        level, numbers, edges = 0, [row["shard"] for row in rows], sum(row["edges"] for row in rows)
        while edges > _EDGES and len(numbers) > 1:
            parts: list[Row] = [
                {"shard": i, "level": level, "numbers": numbers[begin : begin + _MERGED]}
                for i, begin in enumerate(range(0, len(numbers), _MERGED))
            ]
            merge = partial(merge_forests, folder=str(self.folder))
            rows = map_shards(self.ctx, "joining", parts, merge, "forests", lambda row: len(row["numbers"]))
            level, numbers, edges = level + 1, [row["shard"] for row in rows], sum(row["edges"] for row in rows)
        return read_forests(self.folder, level, numbers)

    def decide(self, copied: Copied, compared: Compared) -> Decided:
        """Of all that is in a pair, that a filter has seen, or that is older and has to do with it."""
        seen = np.union1d(copied.seen, compared.seen)
        old = np.union1d(copied.old, compared.edges[compared.edges < self.crawl.offset])
        stays = self.crawl.representatives.of(old)
        known = np.stack((stays, old), axis=1)[stays != old]
        edges = np.concatenate((compared.edges, known))
        numbers = np.unique(np.concatenate((edges.ravel(), old, seen)))
        characters = self._characters(numbers)
        groups = Groups.of(numbers, edges, characters, _GROUP_CHARACTERS)
        for name, array in (("known", known), ("seen", seen)):
            save_array(self.folder / f"{name}.npy", array)
        save_array(numbers_path(self.folder), numbers)
        save_array(groups_path(self.folder), groups.groups)
        if len(numbers):
            said = f"{len(numbers):,} documents may be like others, in {groups.components:,} components"
            self.ctx.note(f"{said}; the largest has {groups.largest:,}")
        files = self._read_again(numbers)
        grouped = self._group(compared.files)
        rules = GroupRules(
            str(self.folder), files, grouped, self.ctx.config.similarity, self.ctx.config.measure == "containment"
        )
        rows = map_shards(
            self.ctx, "deciding", [{"shard": group} for group in range(groups.count)],
            partial(decide_group, rules=rules), "groups", lambda row: 1,
            here=groups.count < 2 and characters.sum() <= _GROUP_CHARACTERS,
        )  # fmt: skip
        tables = [read_decided(decided_path(self.folder, group)) for group in range(groups.count)]
        table = write_decided(self._decided, tables)
        return Decided(table, sum(row["pairs"] for row in rows), sum(row["alike"] for row in rows))

    def _read_again(self, numbers: Indices) -> int:
        """How many files it makes."""
        shingling = self.ctx.config.shingling if self.ctx.config.similarity else None
        read = partial(
            read_again, folder=str(self.folder), sketches=self.sketches, shingling=shingling,
            prefer=self.ctx.config.prefer,
        )  # fmt: skip
        rows = self.crawl.shards.rows_of(numbers)
        few = sum(Path(row["path"]).stat().st_size for row in rows) <= _FEW_BYTES
        map_shards(self.ctx, "reading again", rows, read, "documents", lambda row: row["end"] - row["begin"], here=few)
        return len(rows)

    def _group(self, pairs: Sequence[int]) -> int:
        """Parts pairs, so many in each file, by group; how many files it makes."""
        parts: list[list[int]] = [[]]
        total = 0
        for number, count in enumerate(pairs):
            if total + count > _FILE_PAIRS and parts[-1]:
                parts.append([])
                total = 0
            parts[-1].append(number)
            total += count
        rows: list[Row] = [{"shard": i, "numbers": some} for i, some in enumerate(parts)]
        map_shards(
            self.ctx, "grouping", rows, partial(group_pairs, folder=str(self.folder)), "files",
            lambda row: len(row["numbers"]), here=len(rows) == 1,
        )  # fmt: skip
        return len(rows)

    def write_index(self, decided: Decided) -> None:
        """All of the index but bands and hashes, which are there: who stays for whom, and last of all what it is of.
        Older documents that stayed until tonight's showed what they are like are in superseded.parquet."""
        going = self._superseded(decided)
        superseded = decided.table.filter(pa.array(going)).select(REMOVED).sort_by("id")
        write_parquet(self.ctx.folder / "superseded.parquet", superseded)
        self.ctx.counts["superseded"] = len(superseded)
        if self.ctx.config.index_form == "exact":
            number, kept = decided.table["number"].to_numpy(), decided.table["kept"].to_numpy()
            chosen = going | (number >= self.crawl.offset)
            index.write_representatives(self.ctx.folder, number[chosen], kept[chosen])
        self.crawl.generation().write(self.ctx.folder)

    def _superseded(self, decided: Decided) -> npt.NDArray[np.bool_]:
        """Which rows are of older documents that stayed until now."""
        number, kept = decided.table["number"].to_numpy(), decided.table["kept"].to_numpy()
        stayed: npt.NDArray[np.bool_] = (number < self.crawl.offset) & ~self.crawl.representatives.has(number)
        return stayed & (number != kept)

    def write(self) -> list[Row]:
        write = partial(
            write_kept, folder=str(self.ctx.folder), decided=str(self._decided), copies=str(self.folder),
            ranges=self.crawl.ranges,
        )  # fmt: skip
        return map_shards(self.ctx, "writing", self._shards(), write, "bytes", lambda row: row["size"])

    def clusters(self, decided: Decided) -> int:
        number = decided.table["number"].to_numpy()
        going = (number >= self.crawl.offset) | self._superseded(decided)
        return clusters(decided.table, going, self.folder, self.crawl.ranges)

    def clean(self) -> None:
        shutil.rmtree(self.folder)

    @property
    def _few(self) -> bool:
        return self.crawl.count <= _FEW_DOCUMENTS

    @property
    def _members(self) -> Path:
        return self.folder / "members.npy"

    @property
    def _decided(self) -> Path:
        return self.folder / "decided.arrow"

    def _shards(self) -> list[Row]:
        first = self.sketches.firsts
        return [
            {"shard": i, "path": str(path), "size": path.stat().st_size, "first": first[i]}
            for i, path in enumerate(self.crawl.paths)
        ]

    def _characters(self, numbers: Indices) -> Indices:
        """Of each document; of older ones that is not known: as many as the others have."""
        own = numbers >= self.crawl.offset
        lengths = np.empty(len(numbers), np.int64)
        lengths[own] = self.sketches.lengths(numbers[own])
        lengths[~own] = int(lengths[own].mean()) if own.any() else 1
        return lengths
