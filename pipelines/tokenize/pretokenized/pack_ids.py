"""A task of pretokenized sources: reads the documents of its segments, and writes them as token shards.

Memory is bounded: when a part has twice the ids of a task, they are packed and written as a shard, whatever the files
promised.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moray.actors.data.token_set import TokenVocabulary, write_token_shard
from moray.pipelines.shared.arrays import Indices
from moray.pipelines.shared.documents import document_id
from moray.pipelines.shared.shards import Row
from moray.pipelines.shared.task_records import recorded
from moray.pipelines.split import is_heldout
from moray.pipelines.tokenize.pretokenized.framing import (
    FramedIds,
    Framing,
    UnframedError,
    document_keys,
    frame_ids,
)
from moray.pipelines.tokenize.pretokenized.segments import Segment, task_segments
from moray.pipelines.tokenize.pretokenized.source import PretokenizedSource
from moray.pipelines.tokenize.pretokenized.stored_ids import StoredIds, checked_ids
from moray.pipelines.tokenize.sequence_packing import Packing, TokenDocuments, pack_documents, plan_sequences
from moray.pipelines.tokenizer.token_bytes import token_bytes
from moray.pipelines.tokenizer.train import load_tokenizer
from moray.platform.core.errors import InputError
from moray.platform.store.paths import AnyPath

_SHARDS_PER_TASK = 10_000  # numbers of shards that a task may use


@dataclass(frozen=True)
class PackTask:
    """Settings that are the same for all tasks. tokens: ids of a task."""

    folder: AnyPath
    tokenizer: AnyPath
    vocabulary: TokenVocabulary
    sources: tuple[PretokenizedSource, ...]
    sequence_length: int
    packing: Packing
    tokens: int


@dataclass
class _Part:
    """Documents of the training or the held-out part that are not written yet."""

    names: list[str] = field(default_factory=list)
    sizes: list[Indices] = field(default_factory=list)
    ids: list[npt.NDArray[np.uint32]] = field(default_factory=list)
    lengths: list[Indices] = field(default_factory=list)
    tokens: int = 0

    def documents(self) -> TokenDocuments:
        bounds = np.concatenate([[0], np.cumsum(np.concatenate(self.lengths))])
        return TokenDocuments(self.names, np.concatenate(self.sizes), np.concatenate(self.ids), bounds)


class _Packer:
    """Collects the documents of a task, and writes shards."""

    def __init__(self, task: Row, job: PackTask) -> None:
        self._source, self._first, self._job = job.sources[task["source"]], task["number"] * _SHARDS_PER_TASK, job
        self._parts = {"train": _Part(), "heldout": _Part()}
        self._bytes = _token_bytes(job.tokenizer)
        self.shards: list[Row] = []
        self.counts: Counter[str] = Counter()

    def add(self, segment: Segment, stored: StoredIds) -> None:
        """Adds documents. Raises InputError with the file and the document."""
        job, source = self._job, self._source
        ids = checked_ids(stored, job.vocabulary, segment.file.location)
        try:
            framing = Framing(source.bos == "present", source.eos == "present")
            framed = frame_ids(ids, stored.bounds, job.vocabulary, framing)
        except UnframedError as error:
            where = f"{segment.file.location}: document {stored.first + error.document}"
            raise InputError(f"{where}: {error.message}", error.hint) from error
        self.counts.update(
            empty=framed.empty, split=framed.split, bos=framed.added[0], eos=framed.added[1], documents=len(framed.part)
        )
        held = self._held_out(segment.key, stored.first, framed)
        names = [document_id(source.name, key) for key in document_keys(segment.key, stored.first, framed)]
        sizes = self._sizes(framed)
        for part, chosen in (("train", ~held), ("heldout", held)):
            self._keep(self._parts[part], framed, names, sizes, np.flatnonzero(chosen))
            if self._parts[part].tokens >= 2 * job.tokens:
                self._write(part)

    def _held_out(self, key: str, first: int, framed: FramedIds) -> npt.NDArray[np.bool_]:
        """Whether each document is held out. Documents of one stored document are on the same side."""
        rule = self._source.held_out()
        if rule is None:
            return np.zeros(len(framed.part), np.bool_)
        own, back = np.unique(framed.stored, return_inverse=True)
        sides = [is_heldout(document_id(self._source.name, f"{key}#{first + n}"), rule) for n in own.tolist()]
        return np.array(sides, np.bool_)[back]

    def _sizes(self, framed: FramedIds) -> Indices:
        """UTF-8 bytes of each document."""
        if not len(framed.part):
            return np.zeros(0, np.int64)
        return np.add.reduceat(self._bytes[framed.ids], framed.bounds[:-1])

    def _keep(self, part: _Part, framed: FramedIds, names: Sequence[str], sizes: Indices, chosen: Indices) -> None:
        if not len(chosen):
            return
        lengths = np.diff(framed.bounds)
        is_chosen = np.zeros(len(lengths), np.bool_)
        is_chosen[chosen] = True
        ids = framed.ids if len(chosen) == len(lengths) else framed.ids[np.repeat(is_chosen, lengths)]
        part.names += [names[n] for n in chosen.tolist()]
        part.sizes.append(sizes[chosen])
        part.ids.append(ids)
        part.lengths.append(lengths[chosen])
        part.tokens += len(ids)

    def _write(self, part: str) -> None:
        job, name = self._job, self._source.name
        documents, self._parts[part] = self._parts[part].documents(), _Part()
        number = sum(shard["part"] == part for shard in self.shards)
        if number == _SHARDS_PER_TASK:
            raise InputError(f"source {name!r}: a file needs more than {number} shards", "raise tokenize.group_bytes")
        packing = job.packing if part == "train" else "concatenate"
        pieces = plan_sequences(np.diff(documents.bounds), job.sequence_length, packing)
        packed, rows = pack_documents(documents, pieces, job.sequence_length, job.vocabulary)
        made = write_token_shard(job.folder / part / name, self._first + number, packed, rows)
        cut = pieces.cut(job.sequence_length)
        self.shards.append({"part": part, "source": name, **asdict(made), "cut": cut})

    def finish(self) -> None:
        """Writes the rest."""
        for part, rest in self._parts.items():
            if rest.names:
                self._write(part)


def pack_ids(task: Row, job: PackTask) -> Row:
    """Packs the documents of one task. Runs in a Ray worker."""
    return recorded(job.folder, f"ids-{task['shard']:05d}", lambda: _pack(task, job))


def _pack(task: Row, job: PackTask) -> Row:
    packer = _Packer(task, job)
    for segment in task_segments(task):
        for stored in segment.read():
            packer.add(segment, stored)
    packer.finish()
    counts = {f"ids:{name}": packer.counts[name] for name in ("documents", "empty", "split", "bos", "eos")}
    return {"shard": task["shard"], "source": task["source"], "shards": json.dumps(packer.shards), **counts}


@lru_cache(maxsize=1)
def _token_bytes(tokenizer: AnyPath) -> Indices:
    return token_bytes(load_tokenizer(tokenizer))
