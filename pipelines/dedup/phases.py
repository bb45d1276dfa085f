"""The phases of dedup: a table of what each reads, writes and runs, and the code behind it.

Every shard is signed; every range of hashes is searched for exact copies, every range of every band for documents that
share a key. Connected components of these pairs are packed into groups; the documents in them, and only they, are read
again, and every group is decided by itself. Last, every shard is written without what is removed.

Text stays inside tasks, but for that of few candidates. This process holds a byte of each document (`members`), and
some 100 bytes of each that is in a pair. Phases of few documents run here: that takes less than starting tasks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.dedup import dedup_index
from moray.pipelines.dedup.compare_keys import compare_keys, merge_forests, read_forests
from moray.pipelines.dedup.config import DedupConfig
from moray.pipelines.dedup.crawl import Crawl
from moray.pipelines.dedup.decide import (
    GroupRules,
    decide_group,
    group_pairs,
    read_candidates,
    read_decided,
    write_decided,
)
from moray.pipelines.dedup.exact import IndexForm, find_copies
from moray.pipelines.dedup.groups import Groups
from moray.pipelines.dedup.phase_files import FileKind, PhaseFiles
from moray.pipelines.dedup.sign import sign_shard
from moray.pipelines.dedup.sketches import Sketches
from moray.pipelines.dedup.write import REMOVED, count_clusters, write_kept
from moray.pipelines.shared.arrays import Indices, save_array
from moray.pipelines.shared.documents import write_parquet
from moray.pipelines.shared.shards import Row, file_bytes, map_shards
from moray.platform.plan.context import StepContext

_FOLDER = ".work"
_GROUP_CHARACTERS = 50_000_000  # of documents that a worker compares at once: some 400 MB of shingles at the most
_FILE_PAIRS = 20_000_000  # that are parted by group at once
_EDGES = 100_000_000  # of forests: of more, some are merged by others before this process joins them
_MERGED = 16  # forests at once
_FEW_DOCUMENTS = 1 << 18  # that are compared here
_FEW_BYTES = 10_000_000  # of files that are read again here


@dataclass(frozen=True)
class ExactMatches:
    """earlier: numbers of earlier documents that have copies here; seen: of those whose text a filter has seen."""

    earlier: Indices
    seen: Indices


@dataclass(frozen=True)
class CandidatePairs:
    """counts: pairs in each file; edges: in the files' forests, by file; seen: numbers of documents whose key a filter
    has seen; capped: keys that so many share that not all their pairs are compared."""

    counts: list[int]
    edges: list[int]
    seen: Indices
    capped: int


@dataclass(frozen=True)
class Clusters:
    """Groups of candidate documents, with each one's length in characters."""

    numbers: Indices
    characters: Indices
    groups: Groups


@dataclass(frozen=True)
class Decisions:
    """table: rows of decide.DECIDED, by number; pairs: that were candidates; alike: that were near duplicates."""

    table: pa.Table
    pairs: int
    alike: int


@dataclass
class DedupRun:
    """One run of the step, and what its phases have found so far, in the order of the table."""

    ctx: StepContext[DedupConfig]
    crawl: Crawl
    exact: ExactMatches = field(init=False)
    pairs: CandidatePairs = field(init=False)
    edges: Indices = field(init=False)
    clusters: Clusters = field(init=False)
    candidate_files: int = field(init=False)
    pair_files: int = field(init=False)
    decisions: Decisions = field(init=False)
    written: list[Row] = field(init=False)

    @property
    def folder(self) -> Path:
        return self.ctx.folder / _FOLDER

    @property
    def form(self) -> IndexForm:
        return IndexForm(
            self.ctx.config.index_form if self.ctx.config.index else "", str(self.ctx.folder), self.crawl.earlier
        )

    @property
    def few(self) -> bool:
        return self.crawl.count <= _FEW_DOCUMENTS

    def sketches(self, files: PhaseFiles) -> Sketches:
        return self.crawl.sketches(files.read("sketches"))

    def shards(self) -> list[Row]:
        firsts = self.crawl.own_firsts
        return [
            {"shard": i, "path": str(path), "size": path.stat().st_size, "first": firsts[i]}
            for i, path in enumerate(self.crawl.paths)
        ]

    def superseded(self) -> npt.NDArray[np.bool_]:
        """Which rows of the decisions are earlier documents that were kept until now."""
        number, kept = self.decisions.table["number"].to_numpy(), self.decisions.table["kept"].to_numpy()
        stayed: npt.NDArray[np.bool_] = (number < self.crawl.offset) & ~self.crawl.representatives.has(number)
        return stayed & (number != kept)


@dataclass(frozen=True)
class Phase:
    """A row of the table. `run` may use the work files of these kinds only."""

    reads: frozenset[FileKind]
    writes: frozenset[FileKind]
    run: Callable[[DedupRun, PhaseFiles], None]


def sign(run: DedupRun, files: PhaseFiles) -> None:
    """Sketches of every document: identity, hash and band keys."""
    config = run.ctx.config
    task = partial(sign_shard, folder=str(files.write("sketches")), shingling=config.shingling, prefer=config.prefer)
    map_shards(run.ctx, "signing", run.shards(), task, "bytes", file_bytes)


def match_exact(run: DedupRun, files: PhaseFiles) -> None:
    """Exact copies, by ranges of hashes; `members` are the first documents of each text, whose keys are compared."""
    crawl = run.crawl
    task = partial(find_copies, files=files, sketches=run.sketches(files), kept=run.form)
    ranges: list[Row] = [{"shard": part} for part in range(crawl.ranges)]
    map_shards(run.ctx, "finding copies", ranges, task, "ranges", lambda row: 1, here=run.few)
    members = np.ones(crawl.count, np.bool_)
    earlier, seen = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for part in range(crawl.ranges):
        members[np.load(files.read("copies", part)) - crawl.offset] = False
        seen.append(np.load(files.read("seen_hashes", part)))
        originals = np.unique(np.load(files.read("originals", part), mmap_mode="r")["number"])
        earlier.append(originals[originals < crawl.offset])
    members[np.concatenate(seen) - crawl.offset] = False
    save_array(files.write("members"), members)
    run.exact = ExactMatches(np.concatenate(earlier), np.concatenate(seen))


def match_keys(run: DedupRun, files: PhaseFiles) -> None:
    """Pairs of documents that share a band key, by ranges of every band, and a spanning forest of each range."""
    bands, ranges = run.ctx.config.shingling.bands, run.crawl.ranges
    task = partial(compare_keys, files=files, sketches=run.sketches(files), offset=run.crawl.offset, kept=run.form)
    parts: list[Row] = [
        {"shard": band * ranges + part, "band": band, "range": part} for band in range(bands) for part in range(ranges)
    ]
    rows = map_shards(run.ctx, "comparing", parts, task, "ranges", lambda row: 1, here=run.few)
    seen = [np.load(files.read("seen_keys", row["shard"])) for row in rows if row["seen"]]
    run.pairs = CandidatePairs(
        [row["pairs"] for row in rows],
        [row["edges"] for row in rows],
        np.unique(np.concatenate([np.zeros(0, np.int64), *seen])),
        sum(row["capped"] for row in rows),
    )


def join_forests(run: DedupRun, files: PhaseFiles) -> None:
    """The edges of all forests, merged in a tree until they are few."""
    level, numbers, edges = 0, list(range(len(run.pairs.edges))), sum(run.pairs.edges)
    while edges > _EDGES and len(numbers) > 1:
        parts: list[Row] = [
            {"shard": i, "level": level, "numbers": numbers[begin : begin + _MERGED]}
            for i, begin in enumerate(range(0, len(numbers), _MERGED))
        ]
        task = partial(merge_forests, files=files)
        rows = map_shards(run.ctx, "joining", parts, task, "forests", lambda row: len(row["numbers"]))
        level, numbers, edges = level + 1, [row["shard"] for row in rows], sum(row["edges"] for row in rows)
    run.edges = read_forests(files, level, numbers)


def group_documents(run: DedupRun, files: PhaseFiles) -> None:
    """Groups of components: of documents that are in a pair, that a filter has seen, or earlier ones that these match.

    An earlier document that was removed brings the one that is kept for it: the two belong together (`known`).
    """
    crawl = run.crawl
    seen = np.union1d(run.exact.seen, run.pairs.seen)
    earlier = np.union1d(run.exact.earlier, run.edges[run.edges < crawl.offset])
    representatives = crawl.representatives.of(earlier)
    known = np.stack((representatives, earlier), axis=1)[representatives != earlier]
    edges = np.concatenate((run.edges, known))
    numbers = np.unique(np.concatenate((edges.ravel(), earlier, seen)))
    characters = _characters(run, files, numbers)
    groups = Groups.of(numbers, edges, characters, _GROUP_CHARACTERS)
    save_array(files.write("known"), known)
    save_array(files.write("seen"), seen)
    save_array(files.write("numbers"), numbers)
    save_array(files.write("groups"), groups.groups)
    if len(numbers):
        said = f"{len(numbers):,} documents may be like others, in {groups.components:,} components"
        run.ctx.note(f"{said}; the largest has {groups.largest:,}")
    run.clusters = Clusters(numbers, characters, groups)


def read_grouped(run: DedupRun, files: PhaseFiles) -> None:
    """The documents to be decided, read again, by group."""
    config = run.ctx.config
    task = partial(
        read_candidates,
        files=files,
        sketches=run.sketches(files),
        shingling=config.shingling if config.similarity else None,
        prefer=config.prefer,
    )
    rows = run.crawl.shards.rows_of(run.clusters.numbers)
    few = sum(Path(row["path"]).stat().st_size for row in rows) <= _FEW_BYTES
    map_shards(run.ctx, "reading again", rows, task, "documents", lambda row: row["end"] - row["begin"], here=few)
    run.candidate_files = len(rows)


def group_candidate_pairs(run: DedupRun, files: PhaseFiles) -> None:
    """The pairs, so many in each file, by group."""
    parts: list[list[int]] = [[]]
    total = 0
    for number, count in enumerate(run.pairs.counts):
        if total + count > _FILE_PAIRS and parts[-1]:
            parts.append([])
            total = 0
        parts[-1].append(number)
        total += count
    rows: list[Row] = [{"shard": i, "numbers": some} for i, some in enumerate(parts)]
    task = partial(group_pairs, files=files)
    map_shards(run.ctx, "grouping", rows, task, "files", lambda row: len(row["numbers"]), here=len(rows) == 1)
    run.pair_files = len(rows)


def decide(run: DedupRun, files: PhaseFiles) -> None:
    """Every group by itself: exact similarity of its pairs, and which document of each cluster is kept."""
    config, groups = run.ctx.config, run.clusters.groups
    rules = GroupRules(run.candidate_files, run.pair_files, config.similarity, config.measure == "containment")
    few = groups.count < 2 and run.clusters.characters.sum() <= _GROUP_CHARACTERS
    rows = map_shards(
        run.ctx,
        "deciding",
        [{"shard": group} for group in range(groups.count)],
        partial(decide_group, files=files, rules=rules),
        "groups",
        lambda row: 1,
        here=few,
    )
    tables = [read_decided(files.read("group_decisions", group)) for group in range(groups.count)]
    table = write_decided(files.write("decisions"), tables)
    run.decisions = Decisions(table, sum(row["pairs"] for row in rows), sum(row["alike"] for row in rows))


def finish_index(run: DedupRun, files: PhaseFiles) -> None:
    """All of the index but bands and hashes, which are there: which document is kept for which, and last its head.

    Earlier documents that were kept until this run showed what they are like are in superseded.parquet.
    """
    if not run.ctx.config.index:
        return
    superseded = run.superseded()
    removed = run.decisions.table.filter(pa.array(superseded)).select(REMOVED).sort_by("id")
    write_parquet(run.ctx.folder / "superseded.parquet", removed)
    run.ctx.counts["superseded"] = len(removed)
    if run.ctx.config.index_form == "exact":
        number, kept = run.decisions.table["number"].to_numpy(), run.decisions.table["kept"].to_numpy()
        chosen = superseded | (number >= run.crawl.offset)
        dedup_index.write_representatives(run.ctx.folder, number[chosen], kept[chosen])
    run.crawl.generation().write(run.ctx.folder)


def write_shards(run: DedupRun, files: PhaseFiles) -> None:
    """Every shard without what is removed, and beside it what is removed; then the number of clusters."""
    task = partial(write_kept, files=files, folder=str(run.ctx.folder), ranges=run.crawl.ranges)
    run.written = map_shards(run.ctx, "writing", run.shards(), task, "bytes", file_bytes)
    removed = (run.decisions.table["number"].to_numpy() >= run.crawl.offset) | run.superseded()
    run.ctx.counts["clusters"] = count_clusters(run.decisions.table, removed, files, run.crawl.ranges)


def _row(
    run: Callable[[DedupRun, PhaseFiles], None], reads: Sequence[FileKind] = (), writes: Sequence[FileKind] = ()
) -> Phase:
    return Phase(frozenset(reads), frozenset(writes), run)


# phase_files.py says what each kind of file holds.
PHASES = (
    _row(sign, writes=("sketches",)),
    _row(match_exact, reads=("sketches",), writes=("copies", "originals", "seen_hashes", "members")),
    _row(match_keys, reads=("sketches", "members"), writes=("pairs", "forest", "seen_keys")),
    _row(join_forests, writes=("forest",)),
    _row(group_documents, reads=("sketches",), writes=("numbers", "groups", "known", "seen")),
    _row(read_grouped, reads=("sketches", "numbers", "groups"), writes=("candidates",)),
    _row(group_candidate_pairs, reads=("pairs", "numbers", "groups"), writes=("grouped_pairs", "pair_groups")),
    _row(
        decide, reads=("candidates", "grouped_pairs", "pair_groups", "known", "seen"),
        writes=("group_decisions", "decisions"),
    ),
    _row(finish_index),
    _row(write_shards, reads=("decisions", "copies", "originals")),
)  # fmt: skip


def run_phases(ctx: StepContext[DedupConfig]) -> DedupRun:
    """Runs them in order. What an interrupted run has finished is found and not made again."""
    run = DedupRun(ctx, Crawl.of(ctx))
    run.folder.mkdir(exist_ok=True)
    for phase in PHASES:
        phase.run(run, PhaseFiles(str(run.folder), phase.reads, phase.writes))
    shutil.rmtree(run.folder)
    return run


def _characters(run: DedupRun, files: PhaseFiles, numbers: Indices) -> Indices:
    """The length of each document; of earlier ones, for which it is not known, the mean of the others."""
    own = numbers >= run.crawl.offset
    lengths = np.empty(len(numbers), np.int64)
    lengths[own] = run.sketches(files).lengths(numbers[own])
    lengths[~own] = int(lengths[own].mean()) if own.any() else 1
    return lengths
