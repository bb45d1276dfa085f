"""Verification of candidates: they are read again, compared exactly, and one document of each cluster is kept.

Components of candidates are packed into groups, and one task decides each group independently. The rows of a group are
contiguous in each file, so a task maps only its own part. For a very large component it reads the shingles of a limited
number of pairs at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.dedup.find import Found, find
from moray.pipelines.dedup.graph import once
from moray.pipelines.dedup.phase_files import PhaseFiles
from moray.pipelines.dedup.priority_order import DocumentColumns, described, documents_in, read_documents
from moray.pipelines.dedup.sketches import DOCUMENT, Rows, Sketches, columns_of, rows_of
from moray.pipelines.shared.arrays import Indices, Keys, load_array, mapped, save_array
from moray.pipelines.shared.grouped_file import arrow_writer, read_group, write_groups
from moray.pipelines.shared.shards import Row, shard_path
from moray.pipelines.shared.task_records import recorded
from moray.pipelines.text.minhash import Shingling
from moray.platform.store.paths import AnyPath, local_file

DECIDED = pa.schema(
    [
        ("number", pa.int64()),
        ("kept", pa.int64()),
        ("id", pa.string()),
        ("reason", pa.string()),
        ("representative", pa.string()),
        ("partner", pa.string()),
        ("similarity", pa.float64()),
    ]
)
NO_REPRESENTATIVE = -1  # `kept` of documents removed because a Bloom filter contains one of their cluster
_OLDER = 1 << 32  # exceeds the number of sources
_SHINGLES = 50_000_000  # compared at once: 400 MB, however large the component


@dataclass(frozen=True)
class Group:
    """The documents of one group. shingles: mapped arrays, one per file. files, bounds: for each document, the index of
    the array with its shingles, and their [begin, end) in it."""

    numbers: Indices
    documents: DocumentColumns
    files: Indices
    bounds: Indices
    shingles: list[Keys]

    def in_priority_order(self) -> Group:
        documents, order = self.documents.in_priority_order()
        return replace(
            self, numbers=self.numbers[order], documents=documents, files=self.files[order], bounds=self.bounds[order]
        )

    def shingles_of(self, places: Indices) -> tuple[Indices, Keys]:
        """Reads the shingles of these documents: [begin, end) of each document's shingles, and the shingles."""
        sizes = np.diff(self.bounds[places])[:, 0]
        ends = np.cumsum(sizes)
        read = np.empty(int(ends[-1]) if len(ends) else 0, np.uint64)
        for place, begin, end in zip(places.tolist(), (ends - sizes).tolist(), ends.tolist(), strict=True):
            first, last = self.bounds[place].tolist()
            read[begin:end] = self.shingles[self.files[place]][first:last]
        return np.stack((ends - sizes, ends), axis=1), read

    def at(self, numbers: Indices) -> Indices:
        """The places of the documents with these numbers, of any shape. All numbers must be in the group."""
        order = np.argsort(self.numbers)
        found: Indices = order[np.searchsorted(self.numbers[order], numbers)]
        return found


def read_candidates(
    shard: Row, files: PhaseFiles, sketches: Sketches, shingling: Shingling | None, prefer: Sequence[str]
) -> Row:
    """Writes the candidates of a shard, one batch per group. `shingling`: also write their shingles."""
    path = files.write("candidates", shard["shard"])
    if not path.exists():
        part = slice(shard["begin"], shard["end"])
        numbers, groups = mapped(files.read("numbers"))[part], mapped(files.read("groups"))[part]
        own = shard["age"] == 0
        text = None
        if shingling or not own:
            text = read_documents(shard_path(shard)).take(pa.array(numbers - shard["first"]))
        if own or text is None:
            rows = sketches.documents(numbers)
        else:
            older = documents_in(pa.table(described(text)), prefer)
            rows = rows_of(replace(older, sources=older.sources + shard["age"] * _OLDER))
        columns = {"number": pa.array(numbers), "document": _binary(rows)}
        if shingling and text is not None:
            sets, bounds = shingling.sets(text["text"])
            columns["shingles"] = pa.LargeListArray.from_arrays(pa.array(bounds), pa.array(sets))
        write_groups(path, pa.table(columns), groups)
    return {"shard": shard["shard"]}


def group_pairs(part: Row, files: PhaseFiles) -> Row:
    """Writes the pairs of the files with these `numbers`, sorted by group, and the group of each pair."""
    path = files.write("pair_groups", part["shard"])
    if not path.exists():
        pairs = np.concatenate([load_array(files.read("pairs", number)) for number in part["numbers"]])
        at = np.searchsorted(mapped(files.read("numbers")), pairs[:, 0])
        group = mapped(files.read("groups"))[at]
        order = np.argsort(group, kind="stable")
        save_array(files.write("grouped_pairs", part["shard"]), pairs[order])
        save_array(path, group[order])
    return {"shard": part["shard"]}


@dataclass(frozen=True)
class GroupRules:
    """Parameters of the decision. candidate_files, pair_files: the number of files of the kinds `candidates` and
    `grouped_pairs`. similarity: minimum of duplicates; 0: candidates are not verified."""

    candidate_files: int
    pair_files: int
    similarity: float
    containment: bool


def decide_group(row: Row, files: PhaseFiles, rules: GroupRules) -> Row:
    """Writes a row of DECIDED for each removed document of a group, and for each document of earlier runs."""
    return recorded(files.folder, f"group-{row['shard']:06d}", lambda: _decide(row, files, rules))


def _decide(row: Row, files: PhaseFiles, rules: GroupRules) -> Row:
    group = _read(files, rules.candidate_files, row["shard"]).in_priority_order()
    pairs = _pairs(files, rules.pair_files, row["shard"], group)
    known, seen = mapped(files.read("known")), mapped(files.read("seen"))
    known = known[np.isin(known[:, 0], group.numbers)]
    found = find(group.documents, pairs, _scores(group, pairs, rules), rules.similarity, group.at(known))
    table = _decided(group, found, group.at(seen[np.isin(seen, group.numbers)]))
    with arrow_writer(files.write("group_decisions", row["shard"]), table.schema) as writer:
        writer.write_table(table)
    return {"shard": row["shard"], "pairs": len(pairs), "alike": int(found.similar)}


def read_decided(path: AnyPath) -> pa.Table:
    """Maps a table of decisions into memory."""
    with local_file(path) as local:
        return pa.ipc.open_file(pa.memory_map(str(local))).read_all()


def write_decided(path: AnyPath, tables: Sequence[pa.Table]) -> pa.Table:
    """Writes all tables to one file, sorted by number, and maps it."""
    table = pa.concat_tables([DECIDED.empty_table(), *tables])
    table = table.sort_by("number").combine_chunks()
    with arrow_writer(path, table.schema) as writer:
        writer.write_table(table)
    return read_decided(path)


def _scores(group: Group, pairs: Indices, rules: GroupRules) -> npt.NDArray[np.float64]:
    from moray.pipelines.text.shingles import similarities

    scores = np.ones(len(pairs))
    if rules.similarity:
        sizes = np.diff(group.bounds)[:, 0]
        part = np.cumsum(sizes[pairs].sum(1)) // _SHINGLES
        for chunk in np.split(np.arange(len(pairs)), np.flatnonzero(np.diff(part)) + 1):
            places, at = np.unique(pairs[chunk], return_inverse=True)
            scores[chunk] = similarities(at.reshape(-1, 2), *group.shingles_of(places), rules.containment)
    return scores


def _decided(group: Group, found: Found, seen: Indices) -> pa.Table:
    """The rows of DECIDED. seen: places of documents in a Bloom filter, whose clusters are removed entirely."""
    count = len(group.numbers)
    in_seen_cluster = np.isin(found.labels, found.labels[seen])
    removed = found.labels != np.arange(count)
    names = np.array([name.decode() for name in group.documents.ids.tolist()], object)
    columns: dict[str, npt.NDArray[np.object_]] = {
        "reason": np.where(in_seen_cluster, "seen", "").astype(object), "representative": names.copy(),
        "partner": np.full(count, "", object), "similarity": np.full(count, None, object),
    }  # fmt: skip
    for name, column in columns.items():
        column[removed] = found.removed[name].to_pylist()
    columns["representative"][in_seen_cluster] = ""
    kept = np.where(in_seen_cluster, NO_REPRESENTATIVE, group.numbers[found.labels])
    table = pa.table({"number": group.numbers, "kept": kept, "id": names, **columns}, schema=DECIDED)
    return table.filter(pa.array(removed | in_seen_cluster | (group.documents.sources < 0)))


def _binary(rows: Rows) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(DOCUMENT.itemsize), len(rows), [None, pa.py_buffer(rows.tobytes())]
    )


def _read(files: PhaseFiles, count: int, group: int) -> Group:
    numbers, rows, of_file, bounds = [], [], [], []
    sets: list[Keys] = []
    for file in range(count):
        if (batch := read_group(files.read("candidates", file), group)) is None:
            continue
        numbers.append(batch["number"].to_numpy())
        rows.append(np.frombuffer(batch["document"].buffers()[1], DOCUMENT))
        ends, own = np.zeros(len(batch) + 1, np.int64), np.zeros(0, np.uint64)
        if "shingles" in batch.schema.names:
            ends, own = batch["shingles"].offsets.to_numpy(), batch["shingles"].values.to_numpy()
        of_file.append(np.full(len(batch), len(sets)))
        bounds.append(np.stack((ends[:-1], ends[1:]), axis=1))
        sets.append(own)
    return Group(
        np.concatenate(numbers),
        columns_of(np.concatenate(rows)),
        np.concatenate(of_file),
        np.concatenate(bounds),
        sets,
    )


def _pairs(files: PhaseFiles, count: int, number: int, group: Group) -> Indices:
    """The distinct pairs of a group, as places in it."""
    found = [np.zeros((0, 2), np.int64)]
    for file in range(count):
        groups = mapped(files.read("pair_groups", file))
        begin, end = np.searchsorted(groups, number), np.searchsorted(groups, number, side="right")
        found.append(mapped(files.read("grouped_pairs", file))[begin:end])
    return once(np.sort(group.at(np.concatenate(found)), axis=1), len(group.numbers))
