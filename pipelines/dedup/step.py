"""dedup: exact copies, then near duplicates by MinHash-LSH whose similarity is verified; each cluster keeps one.

Two passes over shards, as Ray Data tasks: the first leaves a row per document (hash, length, band keys), which is
compared without any text; the second reads again, of the shards that have some, only those documents that share a key
with another, to know how alike they really are. `removed.parquet` says of every document that goes which one stays in
its place, and which one it is most like.

A rerun after a kill goes on with the shards whose files are not there yet.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from moray.pipelines.dedup.find import Documents, Found, find, near_candidates, sources_by
from moray.pipelines.dedup.graph import Candidates, Indices
from moray.pipelines.dedup.signatures import Keys, Shingling
from moray.pipelines.documents import content_hash, read_shard, shard_paths, text_bytes, write_parquet, write_shard
from moray.pipelines.shards import Row, map_shards
from moray.platform.step import Step, StepConfig, StepContext

_SIGNATURES, _SETS = ".signatures", ".shingles"


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

    def run(self, ctx: StepContext[DedupConfig]) -> None:
        curve = ", ".join(f"{ctx.config.shingling.chance(s / 10):.3g} at 0.{s}" for s in (5, 6, 7, 8, 9))
        ctx.note(f"two documents share one of {ctx.config.bands} keys with probability {curve} similarity")
        paths = shard_paths(ctx.inputs["documents"].folder)
        shards: list[Row] = [{"shard": i, "path": str(p), "size": p.stat().st_size} for i, p in enumerate(paths)]
        work = ctx.folder / _SIGNATURES
        sign = partial(_sign_shard, folder=str(work), shingling=ctx.config.shingling)
        map_shards(ctx, "signing", shards, sign, "bytes", lambda row: row["size"])
        documents, order = _read_signatures([work / path.name for path in paths], ctx.config).in_keep_order()
        near = near_candidates(documents)
        found = self._find(ctx, documents, order, near, shards)
        write_parquet(ctx.folder / "removed.parquet", found.removed)
        apply = partial(_keep_shard, folder=str(ctx.folder))
        rows = map_shards(ctx, "writing", shards, apply, "bytes", lambda row: row["size"])
        for folder in (_SIGNATURES, _SETS):
            shutil.rmtree(ctx.folder / folder, ignore_errors=True)
        self._say(ctx, len(documents.ids), found, rows)

    def _find(
        self, ctx: StepContext[DedupConfig], documents: Documents, order: Indices, near: Candidates, shards: list[Row]
    ) -> Found:
        if not ctx.config.similarity or not len(near.pairs):
            return find(documents, near, lambda pairs: np.ones(len(pairs)), 0.0)
        starts = _starts([ctx.folder / _SIGNATURES / Path(shard["path"]).name for shard in shards])
        wanted = _rows_by_shard(order[np.unique(near.pairs)], starts)
        chosen: list[Row] = [{**shards[shard], "rows": rows} for shard, rows in wanted.items()]
        read = partial(_shingle_shard, folder=str(ctx.folder / _SETS), shingling=ctx.config.shingling)
        map_shards(ctx, "verifying", chosen, read, "documents", lambda row: len(row["rows"]))
        sets, bounds = _read_sets(ctx.folder / _SETS, chosen, starts, np.argsort(order))

        def measure(pairs: Indices) -> npt.NDArray[np.float64]:
            from moray.pipelines.dedup.shingles import similarities

            scores: npt.NDArray[np.float64] = similarities(pairs, bounds, sets, ctx.config.measure == "containment")
            return scores

        return find(documents, near, measure, ctx.config.similarity)

    def _say(self, ctx: StepContext[DedupConfig], count: int, found: Found, rows: list[Row]) -> None:
        why = found.removed["reason"].to_pylist()
        ctx.counts |= {
            "in:documents": count,
            "out:documents": sum(row["kept"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows),
            "exact": why.count("exact"),
            "near": why.count("near"),
            "clusters": found.clusters,
            "candidates": len(found.candidates.pairs),
            "verified": found.alike,
        }
        if found.candidates.capped:
            ctx.note(f"{found.candidates.capped} keys are shared by many: not every pair of theirs is looked at")
        ctx.outcome = f"removed {why.count('exact')} exact, {why.count('near')} near, in {found.clusters} clusters"


def _sign_shard(shard: Row, folder: str, shingling: Shingling) -> Row:
    """Writes the signature rows of one shard. Runs in a Ray worker."""
    path = Path(folder) / Path(shard["path"]).name
    if not path.exists():
        table = read_shard(Path(shard["path"]), ["id", "text", "source"])
        texts = [text.as_py() for text in table["text"]]
        keys, shingles = shingling.keys(table["text"])
        signed = pa.table(
            {
                "id": table["id"],
                "source": table["source"],
                "hash": pa.array([content_hash(text) for text in texts], pa.string()),
                "length": pa.array([len(text) for text in texts], pa.int64()),
                "shingles": pa.array(shingles, pa.int64()),
                "keys": pa.FixedSizeListArray.from_arrays(pa.array(keys.ravel(), pa.uint64()), shingling.bands),
            }
        )
        write_parquet(path, signed)
    return {"shard": shard["shard"]}


def _read_signatures(paths: list[Path], config: DedupConfig) -> Documents:
    table = pa.concat_tables([read_shard(path) for path in paths]).combine_chunks()
    return Documents(
        ids=np.array(table["id"].to_pylist(), "S"),
        hashes=np.array(table["hash"].to_pylist(), "S"),
        sources=sources_by(config.prefer, table["source"].to_pylist()),
        lengths=table["length"].to_numpy(),
        shingles=table["shingles"].to_numpy(),
        keys=table["keys"].combine_chunks().flatten().to_numpy().reshape(-1, config.bands),
    )


def _starts(paths: list[Path]) -> Indices:
    """The place of each shard's first document, of all documents."""
    sizes = [pq.read_metadata(path).num_rows for path in paths]
    return np.cumsum([0, *sizes[:-1]], dtype=np.int64)


def _rows_by_shard(places: Indices, starts: Indices) -> dict[int, list[int]]:
    """Rows within their shards, of places counted over all shards."""
    rows: dict[int, list[int]] = defaultdict(list)
    for place in np.sort(places).tolist():
        shard = int(np.searchsorted(starts, place, side="right")) - 1
        rows[shard].append(place - int(starts[shard]))
    return rows


def _shingle_shard(shard: Row, folder: str, shingling: Shingling) -> Row:
    """Writes the shingles of some rows of a shard. Runs in a Ray worker."""
    path = Path(folder) / f"{Path(shard['path']).stem}.parquet"
    if not path.exists():
        sets, bounds = shingling.sets(read_shard(Path(shard["path"]), ["text"])["text"].take(shard["rows"]))
        lists = pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), pa.array(sets, pa.uint64()))
        write_parquet(path, pa.table({"shingles": lists}))
    return {"shard": shard["shard"]}


def _read_sets(folder: Path, chosen: list[Row], starts: Indices, keep_index: Indices) -> tuple[Keys, Indices]:
    """The shingles of all chosen rows, one document after another, and [begin, end) of each document's, in keep order.

    starts: the place of each shard's first document; keep_index: of a place.
    """
    bounds, sets, at = np.zeros((len(keep_index), 2), np.int64), [], 0
    for shard in chosen:
        lists = read_shard(folder / f"{Path(shard['path']).stem}.parquet")["shingles"].combine_chunks()
        own = at + (lists.offsets.to_numpy() - lists.offsets[0].as_py())
        documents = keep_index[starts[shard["shard"]] + np.array(shard["rows"])]
        bounds[documents, 0], bounds[documents, 1] = own[:-1], own[1:]
        sets.append(lists.flatten().to_numpy())
        at = int(own[-1])
    return np.concatenate(sets), bounds


def _keep_shard(shard: Row, folder: str) -> Row:
    """Writes one shard without the removed documents. Runs in a Ray worker."""
    path = Path(shard["path"])
    target = Path(folder) / path.name
    if not target.exists():
        removed = read_shard(Path(folder) / "removed.parquet", ["id"])["id"]
        table = read_shard(path)
        gone = pc.is_in(table["id"], value_set=removed.combine_chunks())
        write_shard(target, table.filter(pc.invert(gone)))
    texts = read_shard(target, ["text"])["text"]
    return {
        "shard": shard["shard"],
        "kept": len(texts),
        "bytes": text_bytes(text.as_py() for text in texts),
    }


step = Dedup()
