"""Which documents share a key: pairs of one range of a band, and what of them is enough to tell components.

A range's pairs are never in memory with those of others. Their spanning forest is less than a pair a document, and
forests are merged in a tree until few are left, so what one process joins at the end are documents that are in a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moray.pipelines.dedup import bloom, dedup_index, graph
from moray.pipelines.dedup.exact import IndexForm
from moray.pipelines.dedup.graph import bucket_pairs, buckets, forest
from moray.pipelines.dedup.phase_files import PhaseFiles
from moray.pipelines.dedup.sketches import Sketches, columns_of
from moray.pipelines.shared.arrays import Indices, Keys, mapped, save_array
from moray.pipelines.shared.shards import Row
from moray.pipelines.shared.task_records import recorded
from moray.pipelines.text.shingles import KEY_BITS


def key_column(band: int) -> str:
    return f"key_{band:02d}"


def compare_keys(part: Row, files: PhaseFiles, sketches: Sketches, offset: int, kept: IndexForm) -> Row:
    """Writes the pairs of documents, by number, that share a key of one `range` of a `band`, each ascending; a forest
    of them; and that range of the index, if wanted.

    offset: the number of the first document in `members`. What shares a key with a document that a filter has seen is
    in a file of its own.
    """
    name = f"keys-{part['shard']:06d}"
    return recorded(files.folder, name, lambda: _compare(part, files, sketches, offset, kept))


def _compare(part: Row, files: PhaseFiles, sketches: Sketches, offset: int, kept: IndexForm) -> Row:
    number = part["shard"]
    keys, numbers = sketches.keys(part["band"], part["range"])
    there = mapped(files.read("members"))[numbers - offset].astype(np.bool_)
    keys, numbers = _ordered(keys[there], numbers[there], sketches, everyone=kept.form == "exact")
    seen, old = numbers[:0], (keys[:0], numbers[:0])
    if kept.form == "bloom":
        seen = numbers[bloom.seen(kept.earlier, key_column(part["band"]), keys, KEY_BITS)]
        bloom.write_bloom(Path(kept.folder), key_column(part["band"]), part["range"], keys)
    elif kept.form == "exact":
        old = dedup_index.find_earlier_keys(kept.earlier, part["band"], keys)
        dedup_index.write_band(Path(kept.folder), part["band"], part["range"], keys, numbers)
    found = bucket_pairs(keys, numbers, *old)
    pairs = np.sort(found.pairs, axis=1)
    save_array(files.write("pairs", number), pairs)
    edges = forest(pairs)
    save_array(files.write("forest", 0, number), edges)
    save_array(files.write("seen_keys", number), seen)
    return {"shard": number, "pairs": len(pairs), "edges": len(edges), "seen": len(seen), "capped": int(found.capped)}


def _ordered(keys: Keys, numbers: Indices, sketches: Sketches, everyone: bool) -> tuple[Keys, Indices]:
    """The same, those that share a key in keep order: everyone, or only where so many do that it matters."""
    shared = buckets(keys, 1 if everyone else graph.LARGEST)
    if len(shared):
        _, order = columns_of(sketches.documents(numbers[shared])).in_keep_order()
        alone = np.ones(len(keys), np.bool_)
        alone[shared] = False
        places = np.concatenate((np.flatnonzero(alone), shared[order]))
        keys, numbers = keys[places], numbers[places]
    return keys, numbers


def merge_forests(part: Row, files: PhaseFiles) -> Row:
    """Writes a forest of the forests with these `numbers` of one `level` as one of the next."""
    path = files.write("forest", part["level"] + 1, part["shard"])

    def merge() -> Row:
        edges = forest(read_forests(files, part["level"], part["numbers"]))
        save_array(path, edges)
        return {"shard": part["shard"], "edges": len(edges)}

    return recorded(files.folder, path.stem, merge)


def read_forests(files: PhaseFiles, level: int, numbers: Sequence[int]) -> Indices:
    none = np.zeros((0, 2), np.int64)
    found: Indices = np.concatenate([none, *(np.load(files.read("forest", level, number)) for number in numbers)])
    return found
