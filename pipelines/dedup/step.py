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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from moray.pipelines.dedup.crawl import Crawl
from moray.pipelines.dedup.find import Found, find, with_seen
from moray.pipelines.dedup.graph import Candidates, Indices, together
from moray.pipelines.dedup.index import ranges_for
from moray.pipelines.dedup.nodes import Groups, Nodes, documents_in
from moray.pipelines.dedup.signatures import Shingling
from moray.pipelines.dedup.tasks import (
    Keep,
    compare_band,
    keep_shard,
    measure_group,
    pairs_path,
    reread_path,
    shingle_shard,
    sign_shard,
)
from moray.pipelines.documents import read_shard, shard_paths, write_parquet
from moray.pipelines.shards import Row, map_shards
from moray.platform.differences import differences
from moray.platform.errors import RecipeError
from moray.platform.manifest import Manifest
from moray.platform.step import Step, StepConfig, StepContext

Scores = npt.NDArray[np.float64]

_GROUP_CHARACTERS = 50_000_000  # of documents that a worker compares at once: some 400 MB of shingles at the most
_SIGNATURES, _PAIRS, _SETS, _MEMBERS = ".signatures", ".pairs", ".shingles", ".members.npy"


class DedupConfig(StepConfig):
    shingle: int = Field(5, gt=0, description="consecutive words, or characters, that are compared as one")
    unit: Literal["words", "characters"] = "words"
    bands: int = Field(16, gt=0, description="keys of a document; who shares one with another is looked at")
    rows: int = Field(7, gt=0, description="minima that make a key: more of them, fewer documents that are looked at")
    threshold: float | None = Field(
        None, gt=0, lt=1, description="of bands * rows minima, as many a key as tell best who is as alike as this"
    )
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
    index_form: Literal["exact", "bloom"] = Field(
        "exact", description="bloom: half the size, and what it has seen is not verified"
    )

    @property
    def shingling(self) -> Shingling:
        bands, rows = self.bands, self.rows
        if self.threshold is not None:
            bands, rows = Shingling.for_threshold(self.threshold, bands * rows)
        return Shingling(self.shingle, self.unit == "characters", bands, rows, self.seed)


class Dedup(Step[DedupConfig]):
    name: ClassVar[str] = "dedup"
    version: ClassVar[int] = 4  # 2: near duplicates are verified; words are words. 3: other hashes of words. 4: bands
    Config = DedupConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def chain(self, config: DedupConfig) -> str:
        return config.index

    def follow(self, config: DedupConfig, earlier: Manifest) -> None:
        if earlier.step_version != self.version:
            raise RecipeError(
                f"index {config.index!r} was made by version {earlier.step_version} of dedup, this is {self.version}",
                "use another name for the index: it begins anew",
            )
        if found := list(differences(earlier.config, config.model_dump(mode="json"))):
            raise RecipeError(
                f"index {config.index!r} was made with other settings: {', '.join(map(str, found))}",
                "use those, or another name for the index",
            )

    def run(self, ctx: StepContext[DedupConfig]) -> None:
        sketch = ctx.config.shingling
        curve = ", ".join(f"{sketch.chance(s / 10):.3g} at 0.{s}" for s in (5, 6, 7, 8, 9))
        ctx.note(f"two documents share one of {sketch.bands} keys of {sketch.rows} with probability {curve} similarity")
        paths = shard_paths(ctx.inputs["documents"].folder)
        shards: list[Row] = [{"shard": i, "path": str(p), "size": p.stat().st_size} for i, p in enumerate(paths)]
        sign = partial(sign_shard, folder=str(ctx.folder / _SIGNATURES), shingling=ctx.config.shingling)
        map_shards(ctx, "signing", shards, sign, "bytes", lambda row: row["size"])
        crawl = Crawl.of(ctx, paths, ctx.folder / _SIGNATURES)
        near, seen = crawl.split(self._compare(ctx, crawl))
        nodes, scores = self._read_again(ctx, crawl, near)
        found = self._decide(ctx, crawl, near, nodes, scores)
        if ctx.config.index:
            crawl.write_index(ctx.folder, ctx.config.index_form, nodes, found)
            superseded = found.removed.filter(pa.array(crawl.superseded(nodes, found)))
            write_parquet(ctx.folder / "superseded.parquet", superseded.sort_by("id"))
            ctx.counts["superseded"] = len(superseded)
        removed = found.removed.filter(pa.array(nodes.numbers[found.gone] >= crawl.offset))
        found = with_seen(replace(found, removed=removed), nodes.documents, nodes.at(seen))
        removed = found.removed.sort_by("id")
        write_parquet(ctx.folder / "removed.parquet", removed)
        rows = map_shards(
            ctx, "writing", shards, partial(keep_shard, folder=str(ctx.folder)), "bytes", lambda row: row["size"]
        )
        for folder in (_SIGNATURES, _PAIRS, _SETS):
            shutil.rmtree(ctx.folder / folder, ignore_errors=True)
        (ctx.folder / _MEMBERS).unlink(missing_ok=True)
        self._say(ctx, len(crawl.order), found, near, removed, rows)

    def _compare(self, ctx: StepContext[DedupConfig], crawl: Crawl) -> Candidates:
        """Pairs of numbers that share a key."""
        with (ctx.folder / _MEMBERS).open("wb") as file:
            np.save(file, crawl.order[crawl.members])
        compare = partial(
            compare_band, folder=str(ctx.folder / _PAIRS), members=str(ctx.folder / _MEMBERS), offset=crawl.offset,
            signatures=[str(ctx.folder / _SIGNATURES / path.name) for path in crawl.paths], earlier=crawl.earlier,
            keep=Keep(ctx.config.index_form if ctx.config.index else "", str(ctx.folder), ranges_for(len(crawl.order))),
        )  # fmt: skip
        bands: list[Row] = [{"shard": band} for band in range(ctx.config.shingling.bands)]
        rows = map_shards(ctx, "comparing", bands, compare, "bands", lambda row: 1)
        tables = [read_shard(ctx.folder / _PAIRS / f"band-{band['shard']:02d}.parquet") for band in bands]
        pairs = [np.stack((table["one"].to_numpy(), table["other"].to_numpy()), axis=1) for table in tables]
        return together([Candidates(pair, row["capped"]) for pair, row in zip(pairs, rows, strict=True)])

    def _read_again(self, ctx: StepContext[DedupConfig], crawl: Crawl, near: Candidates) -> tuple[Nodes, Scores]:
        """All that is needed to decide: what stays for old documents, and how alike the pairs of numbers are."""
        old = np.unique(np.concatenate((near.pairs[near.pairs < crawl.offset], crawl.copied[crawl.copied >= 0])))
        stays = np.array([crawl.representatives.get(number, number) for number in old.tolist()], np.int64)
        compared = near.pairs if ctx.config.similarity else near.pairs[:0]
        wanted = np.unique(np.concatenate((compared.ravel(), old, stays)))
        groups = Groups.of(wanted, compared, crawl.weights(wanted), _GROUP_CHARACTERS)
        rows = groups.rows_of(crawl.shards)
        sets = ctx.folder / _SETS
        if rows:
            read = partial(shingle_shard, folder=str(sets), shingling=ctx.config.shingling)
            map_shards(ctx, "reading candidates", rows, read, "documents", lambda row: len(row["rows"]))
        scores = _measure(ctx, groups, compared, len(rows)) if len(compared) else np.ones(len(near.pairs))
        older = _older(sets, len(rows), crawl.offset)
        described = documents_in(older, ctx.config.prefer)
        numbers = older["number"].to_numpy()
        return Nodes.of(crawl.documents, crawl.offset + crawl.order, described, numbers, crawl.shards), scores

    def _decide(
        self, ctx: StepContext[DedupConfig], crawl: Crawl, near: Candidates, nodes: Nodes, scores: Scores
    ) -> Found:
        stays = crawl.representatives
        gone = np.array([number for number in nodes.numbers.tolist() if number in stays], np.int64)
        known = np.stack((nodes.at(np.array([stays[n] for n in gone.tolist()], np.int64)), nodes.at(gone)), axis=1)
        pairs = np.sort(nodes.at(near.pairs), axis=1)
        return find(nodes.documents, pairs, scores, ctx.config.similarity, known)

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
            **({"seen": why.count("seen")} if ctx.config.index_form == "bloom" else {}),
            "clusters": found.clusters,
            "candidates": len(near.pairs),
            "verified": found.alike,
        }
        if near.capped:
            ctx.note(f"{near.capped} keys are shared by many: not every pair of theirs is looked at")
        kinds = ", ".join(
            f"{why.count(kind)} {kind}" for kind in ("exact", "near", "seen") if kind != "seen" or kind in why
        )
        ctx.outcome = f"removed {kinds}, in {found.clusters} clusters"


def _measure(ctx: StepContext[DedupConfig], groups: Groups, pairs: Indices, files: int) -> Scores:
    """How alike each pair of numbers is."""
    group_of = groups.groups[np.searchsorted(groups.numbers, pairs[:, 0])]
    places = [np.flatnonzero(group_of == group) for group in range(groups.count)]
    for group, place in enumerate(places):
        table = pa.table({"one": pairs[place, 0], "other": pairs[place, 1]})
        write_parquet(pairs_path(ctx.folder / _PAIRS, group), table)
    measure = partial(
        measure_group, folder=str(ctx.folder / _PAIRS), sets=str(ctx.folder / _SETS), files=files,
        containment=ctx.config.measure == "containment",
    )  # fmt: skip
    rows: list[Row] = [{"shard": group, "pairs": len(place)} for group, place in enumerate(places) if len(place)]
    map_shards(ctx, "verifying", rows, measure, "pairs", lambda row: row["pairs"])
    scores = np.zeros(len(pairs))
    for row in rows:
        table = read_shard(ctx.folder / _PAIRS / f"scores-{row['shard']:05d}.parquet")
        scores[places[row["shard"]]] = table["score"].to_numpy()
    return scores


def _older(sets: Path, files: int, offset: int) -> pa.Table:
    """What the older of the documents are that were read again, by ascending number."""
    columns = ["number", "id", "source", "hash", "quality", "length"]
    older = [("number", "<", offset)]
    tables = [pq.read_table(reread_path(sets, file), columns=columns, filters=older) for file in range(files)]
    kinds = [pa.int64(), pa.string(), pa.string(), pa.string(), pa.float64(), pa.int64()]
    empty = pa.schema(list(zip(columns, kinds, strict=True))).empty_table()
    return pa.concat_tables([empty, *tables]).sort_by("number")


step = Dedup()
