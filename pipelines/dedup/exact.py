"""Exact copies: of all documents whose hash is of one range, which are the same text as one before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moray.pipelines.dedup import bloom, dedup_index
from moray.pipelines.dedup.dedup_index import Earlier
from moray.pipelines.dedup.graph import buckets
from moray.pipelines.dedup.phase_files import PhaseFiles
from moray.pipelines.dedup.sketches import HASH_BITS, Rows, Sketches, columns_of
from moray.pipelines.shared.arrays import Indices, save_array
from moray.pipelines.shared.shards import Row

ORIGINAL = np.dtype([("number", "<i8"), ("id", "S32")])  # id: "" of an earlier one's
HASHES = "hashes"
_NEW = -1


@dataclass(frozen=True)
class IndexForm:
    """What earlier runs have seen, and how this one is kept for later ones: `exact`, `bloom`, or not at all."""

    form: str
    folder: str
    earlier: Sequence[Earlier]


def find_copies(part: Row, files: PhaseFiles, sketches: Sketches, kept: IndexForm) -> Row:
    """Writes of the documents of one range of hashes the numbers, ascending, of those that are copies, and their
    ORIGINALs: the first with that text, or an earlier document. Of texts that a filter has seen, the first one's
    number."""
    number = part["shard"]
    path = files.write("copies", number)
    if not path.exists():
        values, numbers = sketches.hashes(number)
        if not kept.form:
            numbers = numbers[buckets(values)]  # who is alone is no copy
        documents, order = columns_of(sketches.documents(numbers)).in_keep_order()
        numbers = numbers[order]
        _, firsts, group = np.unique(documents.hashes, return_index=True, return_inverse=True)
        old = np.full(len(firsts), _NEW, np.int64)
        seen = np.zeros(len(firsts), np.bool_)
        if kept.form == "bloom":
            high, _ = dedup_index.halves(documents.hashes[firsts])
            seen = bloom.seen(kept.earlier, HASHES, high, HASH_BITS)
            bloom.write_bloom(Path(kept.folder), HASHES, number, high[~seen])
        elif kept.form:
            old = dedup_index.find_hashes(kept.earlier, documents.hashes[firsts])
            new = firsts[old == _NEW]
            dedup_index.write_hashes(Path(kept.folder), number, documents.hashes[new], numbers[new])
        save_array(files.write("seen_hashes", number), numbers[firsts[seen]])
        copies, originals = _copies(numbers, documents.ids, firsts[group], old[group])
        save_array(files.write("originals", number), originals)
        save_array(path, copies)
    return {"shard": number}


def _copies(numbers: Indices, ids: npt.NDArray[np.bytes_], first: Indices, old: Indices) -> tuple[Indices, Rows]:
    """Of documents in keep order. first: the place of the first with the same text; old: the earlier one's number."""
    copies = np.flatnonzero((old != _NEW) | (first != np.arange(len(first))))
    copies = copies[np.argsort(numbers[copies])]
    originals = np.empty(len(copies), ORIGINAL)
    of_old = old[copies] != _NEW
    originals["number"] = np.where(of_old, old[copies], numbers[first[copies]])
    originals["id"] = np.where(of_old, b"", ids[first[copies]])
    return numbers[copies], originals
