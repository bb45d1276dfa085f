"""Exact copies: among the documents whose hashes are in one range, those with the same text as an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moray.pipelines.dedup import bloom, dedup_index
from moray.pipelines.dedup.dedup_index import Earlier
from moray.pipelines.dedup.graph import buckets
from moray.pipelines.dedup.phase_files import PhaseFiles
from moray.pipelines.dedup.sketches import HASH_BITS, Rows, Sketches, columns_of
from moray.pipelines.shared.arrays import Indices, save_array
from moray.pipelines.shared.shards import Row
from moray.platform.store.paths import AnyPath

ORIGINAL = np.dtype([("number", "<i8"), ("id", "S32")])  # id: "" for a document of an earlier run
HASHES = "hashes"
_NEW = -1


@dataclass(frozen=True)
class IndexForm:
    """The index of earlier runs, and the form in which this run writes its own: `exact`, `bloom`, or '' for none."""

    form: str
    folder: AnyPath
    earlier: Sequence[Earlier]


def find_copies(part: Row, files: PhaseFiles, sketches: Sketches, index: IndexForm) -> Row:
    """Writes the numbers of the exact copies in one range of hashes, ascending, and the ORIGINAL of each.

    The original is the first document with that text, or a document of an earlier run. For the Bloom form, also writes
    the number of the first document of each text that a filter contains.
    """
    number = part["shard"]
    path = files.write("copies", number)
    if not path.exists():
        values, numbers = sketches.hashes(number)
        if not index.form:
            numbers = numbers[buckets(values)]  # a document with a unique hash has no copies
        documents, order = columns_of(sketches.documents(numbers)).in_priority_order()
        numbers = numbers[order]
        _, firsts, group = np.unique(documents.hashes, return_index=True, return_inverse=True)
        old = np.full(len(firsts), _NEW, np.int64)
        seen = np.zeros(len(firsts), np.bool_)
        if index.form == "bloom":
            high, _ = dedup_index.halves(documents.hashes[firsts])
            seen = bloom.seen(index.earlier, HASHES, high, HASH_BITS)
            bloom.write_bloom(index.folder, HASHES, number, high[~seen])
        elif index.form:
            old = dedup_index.find_hashes(index.earlier, documents.hashes[firsts])
            new = firsts[old == _NEW]
            dedup_index.write_hashes(index.folder, number, documents.hashes[new], numbers[new])
        save_array(files.write("seen_hashes", number), numbers[firsts[seen]])
        copies, originals = _copies(numbers, documents.ids, firsts[group], old[group])
        save_array(files.write("originals", number), originals)
        save_array(path, copies)
    return {"shard": number}


def _copies(numbers: Indices, ids: npt.NDArray[np.bytes_], first: Indices, old: Indices) -> tuple[Indices, Rows]:
    """The copies among documents in priority order, and their originals.

    first: the place of the first document with the same text. old: the number of the document with that text in an
    earlier run, or _NEW.
    """
    copies = np.flatnonzero((old != _NEW) | (first != np.arange(len(first))))
    copies = copies[np.argsort(numbers[copies])]
    originals = np.empty(len(copies), ORIGINAL)
    of_old = old[copies] != _NEW
    originals["number"] = np.where(of_old, old[copies], numbers[first[copies]])
    originals["id"] = np.where(of_old, b"", ids[first[copies]])
    return numbers[copies], originals
