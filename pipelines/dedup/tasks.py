"""What workers do for dedup: each function takes a description, leaves a file, and says what it counted.

A task whose file is there returns at once, so a rerun after a kill does what is missing. Text is read here and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moray.pipelines.dedup import bloom, index
from moray.pipelines.dedup.graph import Indices, Keys, bucket_pairs
from moray.pipelines.dedup.index import Earlier
from moray.pipelines.dedup.nodes import described, read_documents
from moray.pipelines.dedup.signatures import Shingling
from moray.pipelines.documents import read_shard, text_bytes, write_batches, write_parquet, write_shard
from moray.pipelines.shards import Row


def key_column(band: int) -> str:
    return f"key_{band:02d}"


def sign_shard(shard: Row, folder: str, shingling: Shingling) -> Row:
    """Writes what is kept of each document of a shard: id, source, hash, length, shingles and keys."""
    path = Path(folder) / Path(shard["path"]).name
    if not path.exists():
        table = read_documents(Path(shard["path"]))
        keys, shingles = shingling.keys(table["text"])
        columns = {key_column(band): pa.array(keys[:, band]) for band in range(shingling.bands)}
        write_parquet(path, pa.table({**described(table), "shingles": pa.array(shingles, pa.int64()), **columns}))
    return {"shard": shard["shard"]}


@dataclass(frozen=True)
class Keep:
    """How a band is kept for later runs: `exact`, `bloom` or, with none, not at all."""

    form: str
    folder: str
    ranges: int


def compare_band(
    band: Row, folder: str, signatures: Sequence[str], members: str, offset: int, earlier: Sequence[Earlier],
    keep: Keep,
) -> Row:  # fmt: skip
    """Writes the pairs of documents, by number, that share a key of one band; and that band of the index, if wanted.

    members: a file of the places of documents, in keep order, that are compared. offset: the number of the first place.
    A pair with -1 is one whose key a filter has seen.
    """
    path = Path(folder) / f"band-{band['shard']:02d}.parquet"
    if not path.exists():
        column = key_column(band["shard"])
        places: Indices = np.load(members)
        every = np.concatenate([read_shard(Path(one), [column])[column].to_numpy() for one in signatures])
        keys, numbers = every[places], offset + places
        if keep.form == "bloom":
            bloom.write(Path(keep.folder), column, keys)
            found, seen = bucket_pairs(keys, numbers), numbers[bloom.seen(earlier, column, keys)]
        else:
            if keep.form == "exact":
                index.write_band(Path(keep.folder), band["shard"], keep.ranges, keys, numbers)
            found, seen = bucket_pairs(keys, numbers, *index.find_keys(earlier, band["shard"], keys)), numbers[:0]
        before = np.concatenate((np.full(len(seen), -1), found.pairs[:, 0]))
        table = pa.table({"one": before, "other": np.concatenate((seen, found.pairs[:, 1]))})
        write_parquet(path, table.replace_schema_metadata({"capped": str(found.capped)}))
    return {"shard": band["shard"], "capped": int(pq.read_schema(path).metadata[b"capped"])}


def shingle_shard(shard: Row, folder: str, shingling: Shingling) -> Row:
    """Writes what some `rows` of a shard are, with their shingles, each of `groups` in row groups of its own."""
    path = reread_path(Path(folder), shard["shard"])
    if not path.exists():
        table = read_documents(Path(shard["path"])).take(shard["rows"])
        sets, bounds = shingling.sets(table["text"])
        lists = pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), pa.array(sets, pa.uint64()))
        numbers, groups = np.array(shard["numbers"], np.int64), np.array(shard["groups"], np.int64)
        whole = pa.table({"number": numbers, "group": groups, **described(table), "shingles": lists})
        order = np.argsort(groups, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
        write_batches(path, whole.schema, (whole.take(pa.array(part)) for part in parts), plain=True)
    return {"shard": shard["shard"]}


def measure_group(group: Row, folder: str, sets: str, files: int, containment: bool) -> Row:
    """Writes how alike the pairs of one group are, whose documents lie in row groups of all files of `sets`."""
    from moray.pipelines.dedup.shingles import similarities

    path = Path(folder) / f"scores-{group['shard']:05d}.parquet"
    if not path.exists():
        pairs = read_shard(pairs_path(Path(folder), group["shard"]))
        numbers, bounds, shingles = _sets_of(Path(sets), files, group["shard"])
        at = np.stack([np.searchsorted(numbers, pairs[name].to_numpy()) for name in ("one", "other")], axis=1)
        write_parquet(path, pa.table({"score": similarities(at, bounds, shingles, containment)}))
    return {"shard": group["shard"]}


def _sets_of(folder: Path, files: int, group: int) -> tuple[Indices, Indices, Keys]:
    """Of one group: numbers, ascending, [begin, end) of each one's shingles, and all shingles."""
    numbers, bounds, sets, at = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)], [np.zeros(0, np.uint64)], 0
    for file in range(files):
        wanted = [("group", "=", group)]  # which row groups, their statistics say
        table = pq.read_table(reread_path(folder, file), columns=["number", "shingles"], filters=wanted)
        for batch in table.to_batches():
            lists = batch["shingles"]
            ends = at + (lists.offsets.to_numpy() - lists.offsets[0].as_py())
            bounds.append(np.stack((ends[:-1], ends[1:]), axis=1))
            sets.append(lists.flatten().to_numpy())
            numbers.append(batch["number"].to_numpy())
            at = int(ends[-1])
    every = np.concatenate(numbers)
    order = np.argsort(every)
    return every[order], np.concatenate(bounds)[order], np.concatenate(sets)


def reread_path(folder: Path, file: int) -> Path:
    return folder / f"part-{file:05d}.parquet"


def pairs_path(folder: Path, group: int) -> Path:
    return folder / f"pairs-{group:05d}.parquet"


def keep_shard(shard: Row, folder: str) -> Row:
    """Writes one shard without the removed documents."""
    path = Path(shard["path"])
    target = Path(folder) / path.name
    if not target.exists():
        removed = read_shard(Path(folder) / "removed.parquet", ["id"])["id"]
        table = read_shard(path)
        gone = pc.is_in(table["id"], value_set=removed.combine_chunks())
        kept = table.filter(pc.invert(gone))
        write_shard(target, kept)
    else:
        kept = read_shard(target, ["text"])
    return {"shard": shard["shard"], "kept": len(kept), "bytes": text_bytes(kept["text"])}
