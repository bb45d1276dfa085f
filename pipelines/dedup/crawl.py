"""What is known of tonight's documents once all are signed, beside what is kept of those of earlier nights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moray.pipelines.dedup import bloom, index
from moray.pipelines.dedup.find import Documents, Found
from moray.pipelines.dedup.graph import Candidates, Indices
from moray.pipelines.dedup.nodes import Nodes, Shards, documents_in
from moray.pipelines.documents import read_shard
from moray.platform.artifacts import ArtifactStore
from moray.platform.fingerprint import EARLIER
from moray.platform.step import StepContext

if TYPE_CHECKING:
    from moray.pipelines.dedup.step import DedupConfig

NEW, SEEN = -1, -2
_HASHES = "hashes"


@dataclass(frozen=True)
class Crawl:
    """What is known of the documents once all are signed. documents: in keep order; order: the place of each;
    members: those of them that are compared; copied: the number of the earlier document with the same text, NEW where
    there is none, SEEN where it is not known which."""

    reference: str
    paths: list[Path]
    documents: Documents
    order: Indices
    members: Indices
    copied: Indices
    earlier: list[index.Earlier]
    shards: Shards
    representatives: dict[int, int]

    @staticmethod
    def of(ctx: StepContext[DedupConfig], paths: list[Path], signatures: Path) -> Crawl:
        columns = ["id", "source", "hash", "quality", "length", "shingles"]
        table = pa.concat_tables([read_shard(signatures / path.name, columns) for path in paths])
        documents, order = documents_in(table, ctx.config.prefer).in_keep_order()
        earlier = _earlier(ctx)
        copied = np.full(len(order), NEW, np.int64)
        firsts = documents.firsts()
        if ctx.config.index_form == "bloom":
            high, _ = index.halves(documents.hashes[firsts])
            copied[firsts] = np.where(bloom.seen(earlier, _HASHES, high), SEEN, NEW)
        else:
            copied[firsts] = index.find_hashes(earlier, documents.hashes[firsts])
        has_keys = table["shingles"].to_numpy()[order] > 0
        generations = [([one.texts / name for name in one.generation.shards], one.generation.rows) for one in earlier]
        own = (paths, [pq.read_metadata(path).num_rows for path in paths])
        return Crawl(
            ctx.inputs["documents"].reference, paths, documents, order,
            firsts[(copied[firsts] == NEW) & has_keys[firsts]], copied, earlier, Shards.of([*generations, own]),
            {} if ctx.config.index_form == "bloom" else index.read_representatives(earlier),
        )  # fmt: skip

    def split(self, near: Candidates) -> tuple[Candidates, Indices]:
        """The pairs of documents; and the numbers of those that a filter has seen, by text or by key."""
        seen = near.pairs[:, 0] < 0
        by_text = self.offset + self.order[self.copied == SEEN]
        return Candidates(near.pairs[~seen], near.capped), np.unique(np.concatenate((by_text, near.pairs[seen, 1])))

    def weights(self, numbers: Indices) -> Indices:
        """Characters of each document with these numbers; of older ones, what they have is not known: as the new."""
        lengths = np.empty(len(self.order), np.int64)
        lengths[self.order] = self.documents.lengths
        own = numbers - self.offset
        return np.where(own < 0, int(lengths.mean()) if len(lengths) else 1, lengths[np.maximum(own, 0)])

    @property
    def offset(self) -> int:
        """The number of the first document."""
        return sum(one.generation.count for one in self.earlier)

    def superseded(self, nodes: Nodes, found: Found) -> npt.NDArray[np.bool_]:
        """Of what goes: older documents that stayed, until new ones showed what they are like."""
        gone = nodes.numbers[found.gone]
        known = np.fromiter(self.representatives, np.int64, len(self.representatives))
        superseded: npt.NDArray[np.bool_] = (gone >= 0) & (gone < self.offset) & ~np.isin(gone, known)
        return superseded

    def write_index(self, folder: Path, form: str, nodes: Nodes, found: Found) -> None:
        """All but the bands, which are there: hashes, who stays for whom, and last of all what it is of."""
        firsts = self.documents.firsts()
        firsts = firsts[self.copied[firsts] == NEW]
        numbers, ranges = self.offset + self.order[firsts], index.ranges_for(len(self.order))
        if form == "bloom":
            bloom.write(folder, _HASHES, index.halves(self.documents.hashes[firsts])[0])
        else:
            index.write_hashes(folder, ranges, self.documents.hashes[firsts], numbers)
            gone = nodes.numbers[found.gone]
            chosen = self.superseded(nodes, found) | np.isin(gone, numbers)
            index.write_representatives(folder, gone[chosen], nodes.numbers[found.labels[found.gone]][chosen])
        rows = [pq.read_metadata(path).num_rows for path in self.paths]
        names = tuple(path.name for path in self.paths)
        index.Generation(self.reference, self.offset, names, tuple(rows), ranges).write(folder)


def _earlier(ctx: StepContext[DedupConfig]) -> list[index.Earlier]:
    """The generations before this one, oldest first, with their files on this machine."""
    store, found = ArtifactStore(ctx.home), []
    link = ctx.inputs.get(EARLIER)
    while link is not None:
        generation = index.Generation.read(link.folder)
        texts = store.fetch(store.find(generation.documents))
        found.append(index.Earlier(generation, link.folder, texts.folder))
        before = link.manifest.inputs.get(EARLIER)
        link = store.fetch(store.find(before)) if before else None
    return found[::-1]
