"""The phases of dedup: the table PHASES, with the files that each phase reads and writes, and the functions it names.

The phases sign every shard, search every range of hashes for exact copies, and search every range of every band for
documents that share a key. They pack the connected components of these pairs into groups, read only the documents in
groups again, and decide each group independently. Last, they write every shard without the removed documents.

Text stays inside tasks, except for small sets of candidates. This process holds one byte per document (`members`) and
about 100 bytes per document in a pair. Small phases run in this process, because starting tasks would take longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.dedup import dedup_index
from moray.pipelines.dedup.compare_bands import compare_bands, merge_forests, read_forests
from moray.pipelines.dedup.config import DedupConfig
from moray.pipelines.dedup.decide import (
    GroupRules,
    decide_group,
    group_pairs,
    read_candidates,
    read_decided,
    write_decided,
)
from moray.pipelines.dedup.dedup_input import DedupInput
from moray.pipelines.dedup.exact import IndexForm, find_copies
from moray.pipelines.dedup.groups import Groups
from moray.pipelines.dedup.phase_files import FileKind, PhaseFiles
from moray.pipelines.dedup.sign import sign_shard
from moray.pipelines.dedup.sketches import Sketches
from moray.pipelines.dedup.write import REMOVED, count_clusters, write_kept
from moray.pipelines.shared.arrays import Indices, load_array, mapped, save_array
from moray.pipelines.shared.documents import write_parquet
from moray.pipelines.shared.shards import Row, file_bytes, map_shards, shard_path
from moray.platform.plan.context import StepContext
from moray.platform.store.paths import AnyPath, file_size, in_threads, remove_folder

_FOLDER = ".work"
_GROUP_CHARACTERS = 50_000_000  # per group: at most about 400 MB of shingles
_FILE_PAIRS = 20_000_000  # pairs that one task sorts by group
_EDGES = 100_000_000  # maximum that this process joins; with more edges, tasks merge forests first
_MERGED = 16  # forests that one task merges
_FEW_DOCUMENTS = 1 << 18  # maximum that this process compares itself
_FEW_BYTES = 10_000_000  # maximum size of files that this process reads again itself


@dataclass(frozen=True)
class ExactMatches:
    """earlier: numbers of documents of earlier runs that have copies in this run. seen: numbers of documents whose
    text is in a Bloom filter."""

    earlier: Indices
    seen: Indices


@dataclass(frozen=True)
class CandidatePairs:
    """counts: pairs in each file. edges: edges of each file's forest. seen: numbers of documents whose key is in a
    Bloom filter. capped: buckets of which not all pairs are compared."""

    counts: list[int]
    edges: list[int]
    seen: Indices
    capped: int


@dataclass(frozen=True)
class Clusters:
    """Groups of candidate documents. numbers, characters: the number and the length of each document."""

    numbers: Indices
    characters: Indices
    groups: Groups


@dataclass(frozen=True)
class Decisions:
    """table: rows of decide.DECIDED, by number. pairs: the number of candidate pairs. similar: the number of them that
    are near duplicates."""

    table: pa.Table
    pairs: int
    similar: int


@dataclass
class DedupRun:
    """One run of the step, and the results of its phases, in the order of PHASES."""

    ctx: StepContext[DedupConfig]
    input: DedupInput
    exact: ExactMatches = field(init=False)
    pairs: CandidatePairs = field(init=False)
    edges: Indices = field(init=False)
    clusters: Clusters = field(init=False)
    candidate_files: int = field(init=False)
    pair_files: int = field(init=False)
    decisions: Decisions = field(init=False)
    written: list[Row] = field(init=False)

    @property
    def folder(self) -> AnyPath:
        return self.ctx.output / _FOLDER

    @property
    def index(self) -> IndexForm:
        return IndexForm(
            self.ctx.config.index_form if self.ctx.config.index else "", self.ctx.output, self.input.earlier
        )

    @property
    def few(self) -> bool:
        return self.input.count <= _FEW_DOCUMENTS

    def sketches(self, files: PhaseFiles) -> Sketches:
        return self.input.sketches(files.read("sketches"))

    def shards(self) -> list[Row]:
        firsts = self.input.own_firsts
        return [
            {"shard": i, "path": str(path), "size": self.input.sizes[i], "first": firsts[i]}
            for i, path in enumerate(self.input.paths)
        ]

    def superseded(self) -> npt.NDArray[np.bool_]:
        """Whether each decided document was kept by earlier runs and is found to be a duplicate by this run."""
        number, kept = self.decisions.table["number"].to_numpy(), self.decisions.table["kept"].to_numpy()
        kept_so_far: npt.NDArray[np.bool_] = (number < self.input.offset) & ~self.input.representatives.has(number)
        return kept_so_far & (number != kept)


@dataclass(frozen=True)
class Phase:
    """A row of PHASES. `run` may use work files of these kinds only."""

    reads: frozenset[FileKind]
    writes: frozenset[FileKind]
    run: Callable[[DedupRun, PhaseFiles], None]


def sign(run: DedupRun, files: PhaseFiles) -> None:
    """Writes the sketches of every document: identity, hash and band keys."""
    config = run.ctx.config
    task = partial(
        sign_shard,
        folder=files.write("sketches"),
        shingling=config.shingling,
        prefer=config.prefer,
        ranges=run.input.ranges,
    )
    map_shards(run.ctx, "signing", run.shards(), task, "bytes", file_bytes)


def match_exact(run: DedupRun, files: PhaseFiles) -> None:
    """Finds exact copies, by ranges of hashes. Sets `members`: the first document of each new text."""
    documents = run.input
    task = partial(find_copies, files=files, sketches=run.sketches(files), index=run.index)
    ranges: list[Row] = [{"shard": part} for part in range(documents.ranges)]
    map_shards(run.ctx, "finding copies", ranges, task, "ranges", lambda row: 1, here=run.few)
    members = np.ones(documents.count, np.bool_)
    earlier, seen = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for part in range(documents.ranges):
        members[load_array(files.read("copies", part)) - documents.offset] = False
        seen.append(load_array(files.read("seen_hashes", part)))
        originals = np.unique(mapped(files.read("originals", part))["number"])
        earlier.append(originals[originals < documents.offset])
    members[np.concatenate(seen) - documents.offset] = False
    save_array(files.write("members"), members)
    run.exact = ExactMatches(np.concatenate(earlier), np.concatenate(seen))


def match_bands(run: DedupRun, files: PhaseFiles) -> None:
    """Finds pairs of documents that share a band key, and a spanning forest of them, by ranges of every band."""
    bands, ranges = run.ctx.config.shingling.bands, run.input.ranges
    task = partial(compare_bands, files=files, sketches=run.sketches(files), offset=run.input.offset, index=run.index)
    parts: list[Row] = [
        {"shard": band * ranges + part, "band": band, "range": part} for band in range(bands) for part in range(ranges)
    ]
    rows = map_shards(run.ctx, "comparing", parts, task, "ranges", lambda row: 1, here=run.few)
    seen = [load_array(files.read("seen_keys", row["shard"])) for row in rows if row["seen"]]
    run.pairs = CandidatePairs(
        [row["pairs"] for row in rows],
        [row["edges"] for row in rows],
        np.unique(np.concatenate([np.zeros(0, np.int64), *seen])),
        sum(row["capped"] for row in rows),
    )


def join_forests(run: DedupRun, files: PhaseFiles) -> None:
    """Merges all forests in a tree until at most _EDGES edges are left, and reads those."""
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
    """Packs components into groups.

    Candidates are the documents in a pair, those found in a Bloom filter, and the documents of earlier runs that match
    any of these. A removed document of an earlier run comes with its representative, as a `known` pair.
    """
    documents = run.input
    seen = np.union1d(run.exact.seen, run.pairs.seen)
    earlier = np.union1d(run.exact.earlier, run.edges[run.edges < documents.offset])
    representatives = documents.representatives.of(earlier)
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
        found = f"{len(numbers):,} candidate documents in {groups.components:,} components"
        run.ctx.note(f"{found}; the largest has {groups.largest:,} documents")
    run.clusters = Clusters(numbers, characters, groups)


def read_grouped(run: DedupRun, files: PhaseFiles) -> None:
    """Reads the candidates again, and writes them by group."""
    config = run.ctx.config
    task = partial(
        read_candidates,
        files=files,
        sketches=run.sketches(files),
        shingling=config.shingling if config.similarity else None,
        prefer=config.prefer,
    )
    rows = run.input.shards.rows_of(run.clusters.numbers)
    few = sum(in_threads(lambda row: file_size(shard_path(row)), rows)) <= _FEW_BYTES
    map_shards(run.ctx, "reading again", rows, task, "documents", lambda row: row["end"] - row["begin"], here=few)
    run.candidate_files = len(rows)


def group_candidate_pairs(run: DedupRun, files: PhaseFiles) -> None:
    """Sorts the pairs by group, up to _FILE_PAIRS at a time."""
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
    """Computes the exact similarity of all pairs, group by group, and selects the document of each cluster to keep."""
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
    tables = in_threads(lambda group: read_decided(files.read("group_decisions", group)), range(groups.count))
    table = write_decided(files.write("decisions"), tables)
    run.decisions = Decisions(table, sum(row["pairs"] for row in rows), sum(row["alike"] for row in rows))


def finish_index(run: DedupRun, files: PhaseFiles) -> None:
    """Completes the index: writes the representatives and, last, index.json. Earlier phases wrote bands and hashes.

    Also writes superseded.parquet: documents that earlier runs kept and that this run finds to be duplicates.
    """
    if not run.ctx.config.index:
        return
    superseded = run.superseded()
    removed = run.decisions.table.filter(pa.array(superseded)).select(REMOVED).sort_by("id")
    write_parquet(run.ctx.folder / "superseded.parquet", removed)
    run.ctx.counts["superseded"] = len(removed)
    if run.ctx.config.index_form == "exact":
        number, kept = run.decisions.table["number"].to_numpy(), run.decisions.table["kept"].to_numpy()
        chosen = superseded | (number >= run.input.offset)
        dedup_index.write_representatives(run.ctx.folder, number[chosen], kept[chosen])
    run.input.generation().write(run.ctx.folder)


def write_shards(run: DedupRun, files: PhaseFiles) -> None:
    """Writes every shard without the removed documents, and the removed documents. Counts the clusters."""
    task = partial(write_kept, files=files, folder=run.ctx.output, ranges=run.input.ranges)
    run.written = map_shards(run.ctx, "writing", run.shards(), task, "bytes", file_bytes)
    removed = (run.decisions.table["number"].to_numpy() >= run.input.offset) | run.superseded()
    run.ctx.counts["clusters"] = count_clusters(run.decisions.table, removed, files, run.input.ranges)


def _row(
    run: Callable[[DedupRun, PhaseFiles], None], reads: Sequence[FileKind] = (), writes: Sequence[FileKind] = ()
) -> Phase:
    return Phase(frozenset(reads), frozenset(writes), run)


# phase_files.py describes the kinds of files.
PHASES = (
    _row(sign, writes=("sketches",)),
    _row(match_exact, reads=("sketches",), writes=("copies", "originals", "seen_hashes", "members")),
    _row(match_bands, reads=("sketches", "members"), writes=("pairs", "forest", "seen_keys")),
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
    """Runs the phases in order. Files that an interrupted run has completed are reused."""
    run = DedupRun(ctx, DedupInput.of(ctx))
    for phase in PHASES:
        phase.run(run, PhaseFiles(run.folder, phase.reads, phase.writes))
    remove_folder(run.folder)
    return run


def _characters(run: DedupRun, files: PhaseFiles, numbers: Indices) -> Indices:
    """The length of each document. Documents of earlier runs, whose length is not stored, get the mean."""
    own = numbers >= run.input.offset
    lengths = np.empty(len(numbers), np.int64)
    lengths[own] = run.sketches(files).lengths(numbers[own])
    lengths[~own] = int(lengths[own].mean()) if own.any() else 1
    return lengths
