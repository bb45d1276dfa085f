"""What becomes of documents that may be alike: they are read again, compared exactly, and of a component one stays.

Components of candidates are packed into groups; a group is decided by itself, in one task. A group's part of a file
lies together, so a task maps what is its own; of a component that is very large it reads the shingles of some pairs at
a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.dedup.find import Found, find
from moray.pipelines.dedup.graph import once
from moray.pipelines.dedup.keep_order import DocumentColumns, described, documents_in, read_documents
from moray.pipelines.dedup.phase_files import PhaseFiles
from moray.pipelines.dedup.sketches import DOCUMENT, Rows, Sketches, columns_of, rows_of
from moray.pipelines.shared.arrays import Indices, Keys, mapped, save_array
from moray.pipelines.shared.grouped_file import arrow_writer, read_group, write_groups
from moray.pipelines.shared.shards import Row
from moray.pipelines.shared.task_records import recorded
from moray.pipelines.text.minhash import Shingling

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
LOST = -1  # `kept` of who goes though nobody here stays: a filter has seen one of them
_OLDER = 1 << 32  # more than there are sources
_SHINGLES = 50_000_000  # of pairs that are compared at once: 400 MB, however large the component


@dataclass(frozen=True)
class Group:
    """The documents of one group. numbers: of each; shingles: mapped, of some files; files, bounds: which has each
    one's, and [begin, end) of them there."""

    numbers: Indices
    documents: DocumentColumns
    files: Indices
    bounds: Indices
    shingles: list[Keys]

    def in_keep_order(self) -> Group:
        documents, order = self.documents.in_keep_order()
        return replace(
            self, numbers=self.numbers[order], documents=documents, files=self.files[order], bounds=self.bounds[order]
        )

    def shingles_of(self, places: Indices) -> tuple[Indices, Keys]:
        """[begin, end) of each of these documents' shingles, and those, which are read."""
        sizes = np.diff(self.bounds[places])[:, 0]
        ends = np.cumsum(sizes)
        read = np.empty(int(ends[-1]) if len(ends) else 0, np.uint64)
        for place, begin, end in zip(places.tolist(), (ends - sizes).tolist(), ends.tolist(), strict=True):
            first, last = self.bounds[place].tolist()
            read[begin:end] = self.shingles[self.files[place]][first:last]
        return np.stack((ends - sizes, ends), axis=1), read

    def at(self, numbers: Indices) -> Indices:
        """The places of the documents with these numbers, which must be there; any shape."""
        order = np.argsort(self.numbers)
        found: Indices = order[np.searchsorted(self.numbers[order], numbers)]
        return found


def read_candidates(
    shard: Row, files: PhaseFiles, sketches: Sketches, shingling: Shingling | None, prefer: Sequence[str]
) -> Row:
    """Writes the documents of a shard that are to be decided, a batch for each group, with their shingles, if those are
    wanted."""
    path = files.write("candidates", shard["shard"])
    if not path.exists():
        here = slice(shard["begin"], shard["end"])
        numbers, groups = mapped(files.read("numbers"))[here], mapped(files.read("groups"))[here]
        own = shard["age"] == 0
        text = None
        if shingling or not own:
            text = read_documents(Path(shard["path"])).take(pa.array(numbers - shard["first"]))
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
    """Writes the pairs of some files, `numbers`, by ascending group; and the groups."""
    path = files.write("pair_groups", part["shard"])
    if not path.exists():
        pairs = np.concatenate([np.load(files.read("pairs", number)) for number in part["numbers"]])
        at = np.searchsorted(mapped(files.read("numbers")), pairs[:, 0])
        group = mapped(files.read("groups"))[at]
        order = np.argsort(group, kind="stable")
        save_array(files.write("grouped_pairs", part["shard"]), pairs[order])
        save_array(path, group[order])
    return {"shard": part["shard"]}


@dataclass(frozen=True)
class GroupRules:
    """How a group is decided. candidate_files, pair_files: how many there are of `candidates` and `grouped_pairs`;
    similarity: of duplicates at least, 0 if nothing is verified."""

    candidate_files: int
    pair_files: int
    similarity: float
    containment: bool


def decide_group(row: Row, files: PhaseFiles, rules: GroupRules) -> Row:
    """Writes a row of DECIDED for each document of a group that is removed, and for each earlier one."""
    return recorded(files.folder, f"group-{row['shard']:06d}", lambda: _decide(row, files, rules))


def _decide(row: Row, files: PhaseFiles, rules: GroupRules) -> Row:
    group = _read(files, rules.candidate_files, row["shard"]).in_keep_order()
    pairs = _pairs(files, rules.pair_files, row["shard"], group)
    known, seen = mapped(files.read("known")), mapped(files.read("seen"))
    known = known[np.isin(known[:, 0], group.numbers)]
    found = find(group.documents, pairs, _scores(group, pairs, rules), rules.similarity, group.at(known))
    table = _decided(group, found, group.at(seen[np.isin(seen, group.numbers)]))
    with arrow_writer(files.write("group_decisions", row["shard"]), table.schema) as writer:
        writer.write_table(table)
    return {"shard": row["shard"], "pairs": len(pairs), "alike": int(found.alike)}


def read_decided(path: Path) -> pa.Table:
    """Mapped, not read."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def write_decided(path: Path, tables: Sequence[pa.Table]) -> pa.Table:
    """All of them as one file, by ascending number."""
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
        for here in np.split(np.arange(len(pairs)), np.flatnonzero(np.diff(part)) + 1):
            places, at = np.unique(pairs[here], return_inverse=True)
            scores[here] = similarities(at.reshape(-1, 2), *group.shingles_of(places), rules.containment)
    return scores


def _decided(group: Group, found: Found, seen: Indices) -> pa.Table:
    """seen: places of documents, with whose components nobody stays."""
    count = len(group.numbers)
    lost = np.isin(found.labels, found.labels[seen])
    gone = found.labels != np.arange(count)
    names = np.array([name.decode() for name in group.documents.ids.tolist()], object)
    columns: dict[str, npt.NDArray[np.object_]] = {
        "reason": np.where(lost, "seen", "").astype(object), "representative": names.copy(),
        "partner": np.full(count, "", object), "similarity": np.full(count, None, object),
    }  # fmt: skip
    for name, column in columns.items():
        column[gone] = found.removed[name].to_pylist()
    columns["representative"][lost] = ""
    kept = np.where(lost, LOST, group.numbers[found.labels])
    table = pa.table({"number": group.numbers, "kept": kept, "id": names, **columns}, schema=DECIDED)
    return table.filter(pa.array(gone | lost | (group.documents.sources < 0)))


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
    """The pairs of a group, of places, each once."""
    found = [np.zeros((0, 2), np.int64)]
    for file in range(count):
        groups = mapped(files.read("pair_groups", file))
        begin, end = np.searchsorted(groups, number), np.searchsorted(groups, number, side="right")
        found.append(mapped(files.read("grouped_pairs", file))[begin:end])
    return once(np.sort(group.at(np.concatenate(found)), axis=1), len(group.numbers))
