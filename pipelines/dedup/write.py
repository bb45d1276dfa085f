"""The last phase of dedup: writes each shard's kept documents, and its removed documents with representatives."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moray.pipelines.dedup.decide import NO_REPRESENTATIVE, read_decided
from moray.pipelines.dedup.phase_files import PhaseFiles
from moray.pipelines.shared.arrays import Indices, load_array, mapped
from moray.pipelines.shared.documents import read_shard, text_bytes, write_parquet, write_shard
from moray.pipelines.shared.shards import Row, shard_path, shard_stem
from moray.pipelines.shared.task_records import recorded
from moray.platform.store.paths import AnyPath

REASONS = ("exact", "near", "seen")
REMOVED = ["id", "reason", "representative", "partner", "similarity"]


def write_kept(shard: Row, files: PhaseFiles, folder: AnyPath, ranges: int) -> Row:
    """Writes documents-NNNNN.parquet and removed-NNNNN.parquet. Returns the number of documents, by reason."""
    return recorded(files.folder, shard_stem(shard), lambda: _write(shard, files, folder, ranges))


def _write(shard: Row, files: PhaseFiles, folder: AnyPath, ranges: int) -> Row:
    source = shard_path(shard)
    documents = read_shard(source)
    numbers, removed = _removed(shard, documents, files, ranges)
    write_parquet(folder / source.name.replace("documents-", "removed-"), removed)
    is_kept = np.ones(len(documents), np.bool_)
    is_kept[numbers - shard["first"]] = False
    kept = documents.filter(pa.array(is_kept))
    write_shard(folder / source.name, kept)
    reasons = {reason: pc.sum(pc.equal(removed["reason"], reason)).as_py() or 0 for reason in REASONS}
    return {"shard": shard["shard"], "kept": len(kept), "bytes": text_bytes(kept["text"]), **reasons}


def _removed(shard: Row, documents: pa.Table, files: PhaseFiles, ranges: int) -> tuple[Indices, pa.Table]:
    """The numbers of a shard's removed documents, and their rows sorted by id."""
    decided = read_decided(files.read("decisions"))
    known = decided["number"].to_numpy()
    begin, end = np.searchsorted(known, [shard["first"], shard["first"] + len(documents)]).tolist()
    near = decided.slice(begin, end - begin)
    found, rows = [near["number"].to_numpy()], [near.select(REMOVED)]
    for part in range(ranges):
        numbers = mapped(files.read("copies", part))
        begin, end = np.searchsorted(numbers, [shard["first"], shard["first"] + len(documents)]).tolist()
        if end > begin:
            originals = mapped(files.read("originals", part))[begin:end]
            found.append(numbers[begin:end])
            ids = documents["id"].take(pa.array(numbers[begin:end] - shard["first"]))
            rows.append(_copies(ids, originals["number"], originals["id"], decided))
    return np.concatenate(found), pa.concat_tables(rows).sort_by("id")


def _copies(ids: pa.ChunkedArray, originals: Indices, names: Indices, decided: pa.Table) -> pa.Table:
    """The rows of removed exact copies. The partner is the original; the representative is the original's.

    originals, names: the number and the id of each copy's original; the id is '' for a document of an earlier run.
    """
    known = decided["number"].to_numpy()
    at = np.searchsorted(known, originals)
    is_decided = np.isin(originals, known)
    of_original = decided.take(pa.array(at[is_decided]))
    representative, partner = names.astype(object), names.astype(object)
    representative[is_decided] = [name.encode() for name in of_original["representative"].to_pylist()]
    partner[is_decided] = [name.encode() for name in of_original["id"].to_pylist()]
    near = np.zeros(len(originals), np.bool_)
    near[is_decided] = pc.equal(of_original["reason"], "near").to_numpy()
    return pa.table(
        {
            "id": ids.cast(pa.string()),
            "reason": pa.array(np.where(near, "near", "exact"), pa.string()),
            "representative": pa.array([name.decode() for name in representative], pa.string()),
            "partner": pa.array([name.decode() for name in partner], pa.string()),
            "similarity": pa.array(np.ones(len(originals))),
        }
    )


def count_clusters(decided: pa.Table, removed: Indices, files: PhaseFiles, ranges: int) -> int:
    """The number of documents that represent others. removed: whether each decided row is removed by this run."""
    number, kept = decided["number"].to_numpy(), decided["kept"].to_numpy()
    representatives, exact_only = [kept[removed]], 0
    for part in range(ranges):  # all copies of an original are in one range
        originals = np.unique(load_array(files.read("originals", part))["number"])
        is_decided = np.isin(originals, number)
        representatives.append(kept[np.searchsorted(number, originals[is_decided])])
        exact_only += int((~np.isin(originals[~is_decided], kept)).sum())
    distinct = np.unique(np.concatenate(representatives))
    return int((distinct != NO_REPRESENTATIVE).sum()) + exact_only
