"""The end of dedup: each shard without what goes, and what goes, with which document stays in its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moray.pipelines.dedup.decide import LOST, read_decided
from moray.pipelines.dedup.phase_files import PhaseFiles
from moray.pipelines.shared.arrays import Indices
from moray.pipelines.shared.documents import read_shard, text_bytes, write_parquet, write_shard
from moray.pipelines.shared.shards import Row
from moray.pipelines.shared.task_records import recorded

REASONS = ("exact", "near", "seen")
REMOVED = ["id", "reason", "representative", "partner", "similarity"]


def write_kept(shard: Row, files: PhaseFiles, folder: str, ranges: int) -> Row:
    """Writes documents-NNNNN.parquet, and removed-NNNNN.parquet; says how many, by reason."""
    return recorded(files.folder, Path(shard["path"]).stem, lambda: _write(shard, files, Path(folder), ranges))


def _write(shard: Row, files: PhaseFiles, folder: Path, ranges: int) -> Row:
    source = Path(shard["path"])
    documents = read_shard(source)
    numbers, removed = _removed(shard, documents, files, ranges)
    write_parquet(folder / source.name.replace("documents-", "removed-"), removed)
    stays = np.ones(len(documents), np.bool_)
    stays[numbers - shard["first"]] = False
    kept = documents.filter(pa.array(stays))
    write_shard(folder / source.name, kept)
    why = {reason: pc.sum(pc.equal(removed["reason"], reason)).as_py() or 0 for reason in REASONS}
    return {"shard": shard["shard"], "kept": len(kept), "bytes": text_bytes(kept["text"]), **why}


def _removed(shard: Row, documents: pa.Table, files: PhaseFiles, ranges: int) -> tuple[Indices, pa.Table]:
    """The numbers of what goes of a shard, and its rows, by id."""
    decided = read_decided(files.read("decisions"))
    known = decided["number"].to_numpy()
    begin, end = np.searchsorted(known, [shard["first"], shard["first"] + len(documents)]).tolist()
    near = decided.slice(begin, end - begin)
    found, rows = [near["number"].to_numpy()], [near.select(REMOVED)]
    for part in range(ranges):
        numbers = np.load(files.read("copies", part), mmap_mode="r")
        begin, end = np.searchsorted(numbers, [shard["first"], shard["first"] + len(documents)]).tolist()
        if end > begin:
            originals = np.load(files.read("originals", part), mmap_mode="r")[begin:end]
            found.append(numbers[begin:end])
            ids = documents["id"].take(pa.array(numbers[begin:end] - shard["first"]))
            rows.append(_copies(ids, originals["number"], originals["id"], decided))
    return np.concatenate(found), pa.concat_tables(rows).sort_by("id")


def _copies(ids: pa.ChunkedArray, originals: Indices, names: Indices, decided: pa.Table) -> pa.Table:
    """A copy goes for what stays in the place of its original, and is most like the original."""
    known = decided["number"].to_numpy()
    at = np.searchsorted(known, originals)
    there = np.isin(originals, known)
    of_original = decided.take(pa.array(at[there]))
    represented, partner = names.astype(object), names.astype(object)
    represented[there] = [name.encode() for name in of_original["representative"].to_pylist()]
    partner[there] = [name.encode() for name in of_original["id"].to_pylist()]
    near = np.zeros(len(originals), np.bool_)
    near[there] = pc.equal(of_original["reason"], "near").to_numpy()
    return pa.table(
        {
            "id": ids.cast(pa.string()),
            "reason": pa.array(np.where(near, "near", "exact"), pa.string()),
            "representative": pa.array([name.decode() for name in represented], pa.string()),
            "partner": pa.array([name.decode() for name in partner], pa.string()),
            "similarity": pa.array(np.ones(len(originals))),
        }
    )


def count_clusters(decided: pa.Table, going: Indices, files: PhaseFiles, ranges: int) -> int:
    """How many documents stay in the place of others. going: which of the decided rows say what goes now."""
    number, kept = decided["number"].to_numpy(), decided["kept"].to_numpy()
    stays, alone = [kept[going]], 0
    for part in range(ranges):  # an original's copies are all of one range
        originals = np.unique(np.load(files.read("originals", part))["number"])
        there = np.isin(originals, number)
        stays.append(kept[np.searchsorted(number, originals[there])])
        alone += int((~np.isin(originals[~there], kept)).sum())
    names = np.unique(np.concatenate(stays))
    return int((names != LOST).sum()) + alone
