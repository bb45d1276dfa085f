"""Candidate pairs: documents that share a band key, by range of a band, and spanning forests of these pairs.

The pairs of different ranges are never in memory together. A spanning forest has fewer edges than documents, and
forests are merged in a tree until few edges are left, so the last merge fits in one process.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moray.pipelines.dedup import bloom, dedup_index, graph
from moray.pipelines.dedup.exact import IndexForm
from moray.pipelines.dedup.graph import bucket_pairs, buckets, forest
from moray.pipelines.dedup.phase_files import PhaseFiles
from moray.pipelines.dedup.sketches import Sketches, columns_of
from moray.pipelines.shared.arrays import Indices, Keys, load_array, mapped, save_array
from moray.pipelines.shared.shards import Row
from moray.pipelines.shared.task_records import recorded
from moray.pipelines.text.shingles import KEY_BITS


def key_column(band: int) -> str:
    return f"key_{band:02d}"


def compare_bands(part: Row, files: PhaseFiles, sketches: Sketches, offset: int, index: IndexForm) -> Row:
    """Writes the pairs of documents that share a key of one `range` of a `band`, and a spanning forest of the pairs.

    A pair holds two document numbers, ascending. With an index, also writes this range of it, and, for the Bloom form,
    the numbers of documents whose key a filter contains. offset: the number of the first document in `members`.
    """
    name = f"keys-{part['shard']:06d}"
    return recorded(files.folder, name, lambda: _compare(part, files, sketches, offset, index))


def _compare(part: Row, files: PhaseFiles, sketches: Sketches, offset: int, index: IndexForm) -> Row:
    number = part["shard"]
    keys, numbers = sketches.keys(part["band"], part["range"])
    is_member = mapped(files.read("members"))[numbers - offset].astype(np.bool_)
    keys, numbers = _ordered(keys[is_member], numbers[is_member], sketches, order_all=index.form == "exact")
    seen, old = numbers[:0], (keys[:0], numbers[:0])
    if index.form == "bloom":
        seen = numbers[bloom.seen(index.earlier, key_column(part["band"]), keys, KEY_BITS)]
        bloom.write_bloom(index.folder, key_column(part["band"]), part["range"], keys)
    elif index.form == "exact":
        old = dedup_index.find_earlier_keys(index.earlier, part["band"], keys)
        dedup_index.write_band(index.folder, part["band"], part["range"], keys, numbers)
    found = bucket_pairs(keys, numbers, *old)
    pairs = np.sort(found.pairs, axis=1)
    save_array(files.write("pairs", number), pairs)
    edges = forest(pairs)
    save_array(files.write("forest", 0, number), edges)
    save_array(files.write("seen_keys", number), seen)
    return {"shard": number, "pairs": len(pairs), "edges": len(edges), "seen": len(seen), "capped": int(found.capped)}


def _ordered(keys: Keys, numbers: Indices, sketches: Sketches, order_all: bool) -> tuple[Keys, Indices]:
    """The keys and numbers, with documents of one bucket in priority order.

    order_all: order every bucket. Else only those of more than LARGEST documents, whose pairs depend on the order.
    """
    shared = buckets(keys, 1 if order_all else graph.LARGEST)
    if len(shared):
        _, order = columns_of(sketches.documents(numbers[shared])).in_priority_order()
        others = np.ones(len(keys), np.bool_)
        others[shared] = False
        places = np.concatenate((np.flatnonzero(others), shared[order]))
        keys, numbers = keys[places], numbers[places]
    return keys, numbers


def merge_forests(part: Row, files: PhaseFiles) -> Row:
    """Merges the forests with these `numbers` of one `level` into one forest of the next level."""
    path = files.write("forest", part["level"] + 1, part["shard"])

    def merge() -> Row:
        edges = forest(read_forests(files, part["level"], part["numbers"]))
        save_array(path, edges)
        return {"shard": part["shard"], "edges": len(edges)}

    return recorded(files.folder, path.stem, merge)


def read_forests(files: PhaseFiles, level: int, numbers: Sequence[int]) -> Indices:
    """The edges [E, 2] of all forests with these numbers of one level."""
    none = np.zeros((0, 2), np.int64)
    found: Indices = np.concatenate([none, *(load_array(files.read("forest", level, number)) for number in numbers)])
    return found
