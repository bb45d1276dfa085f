"""dedup: exact copies, then near duplicates by MinHash-LSH whose similarity is verified; each cluster keeps one.

Phases, each as Ray Data tasks that leave files: every shard is signed (a row per document: hash, length, band keys);
every band is compared, which gives pairs of documents; those documents, and only they, are read again to know how alike
they really are; every shard is written without what goes. `removed.parquet` says of every document that goes which one
stays in its place, and which one it is most like.

With `index`, what earlier runs of that name have seen counts too, as older and so kept first: what goes is what a run
over all of them would remove. A rerun after a kill goes on with the files that are not there yet.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from moray.pipelines.dedup import index
from moray.pipelines.dedup.find import Documents, Found, find
from moray.pipelines.dedup.graph import Candidates, Indices, together
from moray.pipelines.dedup.nodes import Nodes, Reread, Shards, documents_in
from moray.pipelines.dedup.signatures import Shingling
from moray.pipelines.dedup.tasks import compare_band, keep_shard, shingle_shard, sign_shard
from moray.pipelines.documents import read_shard, shard_paths, write_parquet
from moray.pipelines.shards import Row, map_shards
from moray.platform.artifacts import ArtifactStore
from moray.platform.differences import differences
from moray.platform.errors import RecipeError
from moray.platform.fingerprint import EARLIER
from moray.platform.manifest import Manifest
from moray.platform.step import Step, StepConfig, StepContext

_SIGNATURES, _PAIRS, _SETS, _MEMBERS = ".signatures", ".pairs", ".shingles", ".members.npy"


class DedupConfig(StepConfig):
    shingle: int = Field(5, gt=0, description="consecutive words, or characters, that are compared as one")
    unit: Literal["words", "characters"] = "words"
    bands: int = Field(14, gt=0, description="keys of a document; who shares one with another is looked at")
    rows: int = Field(8, gt=0, description="minima that make a key: more of them, fewer documents that are looked at")
    similarity: float = Field(
        0.7, ge=0, le=1, description="of near duplicates at least; 0: whoever shares a key is one, nothing is verified"
    )
    measure: Literal["jaccard", "containment"] = Field(
        "jaccard", description="shingles in common over those of both, or over those of the shorter"
    )
    prefer: tuple[str, ...] = Field((), description="sources whose documents are kept first, best first")
    seed: int = 1
    index: str = Field(
        "", pattern=r"^([a-z0-9][a-z0-9._-]*)?$", description="what runs with this name have seen before counts too"
    )

    @property
    def shingling(self) -> Shingling:
        return Shingling(self.shingle, self.unit == "characters", self.bands, self.rows, self.seed)


class Dedup(Step[DedupConfig]):
    name: ClassVar[str] = "dedup"
    version: ClassVar[int] = 2  # 2: near duplicates are verified; words are words, not what lies between spaces
    Config = DedupConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def chain(self, config: DedupConfig) -> str:
        return config.index

    def follow(self, config: DedupConfig, earlier: Manifest) -> None:
        if found := list(differences(earlier.config, config.model_dump(mode="json"))):
            raise RecipeError(
                f"index {config.index!r} was made with other settings: {', '.join(map(str, found))}",
                "use those, or another name for the index",
            )

    def run(self, ctx: StepContext[DedupConfig]) -> None:
        curve = ", ".join(f"{ctx.config.shingling.chance(s / 10):.3g} at 0.{s}" for s in (5, 6, 7, 8, 9))
        ctx.note(f"two documents share one of {ctx.config.bands} keys with probability {curve} similarity")
        paths = shard_paths(ctx.inputs["documents"].folder)
        shards: list[Row] = [{"shard": i, "path": str(p), "size": p.stat().st_size} for i, p in enumerate(paths)]
        sign = partial(sign_shard, folder=str(ctx.folder / _SIGNATURES), shingling=ctx.config.shingling)
        map_shards(ctx, "signing", shards, sign, "bytes", lambda row: row["size"])
        crawl = _Crawl.of(ctx, paths)
        near = self._compare(ctx, crawl)
        nodes = self._read_again(ctx, crawl, near)
        found = self._decide(ctx, crawl, near, nodes)
        if ctx.config.index:
            crawl.write_index(ctx.folder, nodes, found)
            superseded = found.removed.filter(pa.array(crawl.superseded(nodes, found)))
            write_parquet(ctx.folder / "superseded.parquet", superseded.sort_by("id"))
            ctx.counts["superseded"] = len(superseded)
        removed = found.removed.filter(pa.array(nodes.numbers[found.gone] >= crawl.offset)).sort_by("id")
        write_parquet(ctx.folder / "removed.parquet", removed)
        rows = map_shards(
            ctx, "writing", shards, partial(keep_shard, folder=str(ctx.folder)), "bytes", lambda row: row["size"]
        )
        for folder in (_SIGNATURES, _PAIRS, _SETS):
            shutil.rmtree(ctx.folder / folder, ignore_errors=True)
        (ctx.folder / _MEMBERS).unlink(missing_ok=True)
        self._say(ctx, len(crawl.order), found, near, removed, rows)

    def _compare(self, ctx: StepContext[DedupConfig], crawl: _Crawl) -> Candidates:
        """Pairs of numbers that share a key."""
        with (ctx.folder / _MEMBERS).open("wb") as file:
            np.save(file, crawl.order[crawl.members])
        compare = partial(
            compare_band, folder=str(ctx.folder / _PAIRS), members=str(ctx.folder / _MEMBERS), offset=crawl.offset,
            signatures=[str(ctx.folder / _SIGNATURES / path.name) for path in crawl.paths], earlier=crawl.earlier,
            index_folder=str(ctx.folder) if ctx.config.index else "", ranges=index.ranges_for(len(crawl.order)),
        )  # fmt: skip
        bands: list[Row] = [{"shard": band} for band in range(ctx.config.bands)]
        rows = map_shards(ctx, "comparing", bands, compare, "bands", lambda row: 1)
        tables = [read_shard(ctx.folder / _PAIRS / f"band-{band['shard']:02d}.parquet") for band in bands]
        pairs = [np.stack((table["one"].to_numpy(), table["other"].to_numpy()), axis=1) for table in tables]
        return together([Candidates(pair, row["capped"]) for pair, row in zip(pairs, rows, strict=True)])

    def _read_again(self, ctx: StepContext[DedupConfig], crawl: _Crawl, near: Candidates) -> Nodes:
        """All that is needed to decide: documents of pairs with their shingles, and what stays for old ones."""
        verified = near.pairs if ctx.config.similarity else near.pairs[near.pairs < crawl.offset]
        old = np.unique(np.concatenate((near.pairs[near.pairs < crawl.offset], crawl.copied[crawl.copied >= 0])))
        stays = np.array([crawl.representatives.get(number, number) for number in old.tolist()], np.int64)
        wanted = np.unique(np.concatenate((verified.ravel(), old, stays)))
        rows = crawl.shards.rows_of(wanted)
        read = partial(shingle_shard, folder=str(ctx.folder / _SETS), shingling=ctx.config.shingling)
        if rows:
            map_shards(ctx, "verifying", rows, read, "documents", lambda row: len(row["rows"]))
        files = [ctx.folder / _SETS / f"part-{row['shard']:05d}.parquet" for row in rows]
        read_again = Reread.of(wanted, files, ctx.config.prefer)
        return Nodes.of(crawl.documents, crawl.offset + crawl.order, read_again, crawl.shards)

    def _decide(self, ctx: StepContext[DedupConfig], crawl: _Crawl, near: Candidates, nodes: Nodes) -> Found:
        def measure(pairs: Indices) -> npt.NDArray[np.float64]:
            from moray.pipelines.dedup.shingles import similarities

            if not ctx.config.similarity:
                return np.ones(len(pairs))
            contained = ctx.config.measure == "containment"
            scores: npt.NDArray[np.float64] = similarities(pairs, nodes.bounds, nodes.sets, contained)
            return scores

        pairs = np.sort(nodes.at(near.pairs), axis=1)
        stays = crawl.representatives
        gone = np.array([number for number in nodes.numbers.tolist() if number in stays], np.int64)
        known = np.stack((nodes.at(np.array([stays[n] for n in gone.tolist()], np.int64)), nodes.at(gone)), axis=1)
        return find(nodes.documents, pairs, measure, ctx.config.similarity, known)

    def _say(
        self, ctx: StepContext[DedupConfig], count: int, found: Found, near: Candidates, removed: pa.Table,
        rows: list[Row],
    ) -> None:  # fmt: skip
        why = removed["reason"].to_pylist()
        ctx.counts |= {
            "in:documents": count,
            "out:documents": sum(row["kept"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows),
            "exact": why.count("exact"),
            "near": why.count("near"),
            "clusters": found.clusters,
            "candidates": len(near.pairs),
            "alike": found.alike,
        }
        if near.capped:
            ctx.note(f"{near.capped} keys are shared by many: not every pair of theirs is looked at")
        ctx.outcome = f"removed {why.count('exact')} exact, {why.count('near')} near, in {found.clusters} clusters"


@dataclass(frozen=True)
class _Crawl:
    """What is known of the documents once all are signed. documents: in keep order; order: the place of each;
    members: those of them that are compared; copied: the number of the earlier document with the same text, or -1."""

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
    def of(ctx: StepContext[DedupConfig], paths: list[Path]) -> _Crawl:
        columns = ["id", "source", "hash", "length", "shingles"]
        table = pa.concat_tables([read_shard(ctx.folder / _SIGNATURES / path.name, columns) for path in paths])
        documents, order = documents_in(table, ctx.config.prefer).in_keep_order()
        earlier = _earlier(ctx)
        copied = np.full(len(order), -1, np.int64)
        firsts = documents.firsts()
        copied[firsts] = index.find_hashes(earlier, documents.hashes[firsts])
        has_keys = table["shingles"].to_numpy()[order] > 0
        generations = [([one.texts / name for name in one.generation.shards], one.generation.rows) for one in earlier]
        own = (paths, [pq.read_metadata(path).num_rows for path in paths])
        return _Crawl(
            ctx.inputs["documents"].reference, paths, documents, order,
            firsts[(copied[firsts] < 0) & has_keys[firsts]], copied, earlier, Shards.of([*generations, own]),
            index.read_representatives(earlier),
        )  # fmt: skip

    @property
    def offset(self) -> int:
        """The number of the first document."""
        return sum(one.generation.count for one in self.earlier)

    def superseded(self, nodes: Nodes, found: Found) -> npt.NDArray[np.bool_]:
        """Of what goes: older documents that stayed, until new ones showed what they are like."""
        gone = nodes.numbers[found.gone]
        known = np.fromiter(self.representatives, np.int64, len(self.representatives))
        superseded: npt.NDArray[np.bool_] = (gone < self.offset) & ~np.isin(gone, known)
        return superseded

    def write_index(self, folder: Path, nodes: Nodes, found: Found) -> None:
        """All but the bands, which are there: hashes, who stays for whom, and last of all what it is of."""
        firsts = self.documents.firsts()
        firsts = firsts[self.copied[firsts] < 0]
        numbers, ranges = self.offset + self.order[firsts], index.ranges_for(len(self.order))
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


step = Dedup()
