"""dedup: exact, then near duplicates by MinHash-LSH (datasketch), then connected components; each cluster keeps one.

One pass over the text makes a row per document: content hash, length, and 112 minima over word 5-gram shingles in 14
bands of 8 (FineWeb's setting; a pair with Jaccard 0.72 shares a band with probability one half, 0.8 with 0.92). Bands
are compared without the text. The kept member of a cluster is decided by (source order in `prefer`, length, content
hash, id), never by the order in which documents or workers come; `removed.parquet` names the representative of every
document that goes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from moray.pipelines.documents import content_hash, read_shard, shard_paths, text_bytes, write_parquet, write_shard
from moray.pipelines.shards import Row, map_shards
from moray.platform.step import Step, StepConfig, StepContext

# Minima of 32-bit hashes under affine maps modulo 2**32: datasketch's fast scheme.
_SCHEME = "affine32"


class DedupConfig(StepConfig):
    bands: int = Field(14, gt=0)
    rows: int = Field(8, gt=0)
    shingle_words: int = Field(5, gt=0)
    prefer: tuple[str, ...] = Field((), description="sources whose documents are kept first, best first")
    seed: int = 1


@dataclass(frozen=True)
class Signatures:
    """What dedup knows of n documents: columns of equal length; `minima` is [n, bands * rows] uint64."""

    ids: list[str]
    sources: list[str]
    hashes: list[str]
    lengths: npt.NDArray[np.int64]
    minima: npt.NDArray[np.uint64]


class Dedup(Step[DedupConfig]):
    name: ClassVar[str] = "dedup"
    version: ClassVar[int] = 1
    Config = DedupConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    needs_ray: ClassVar[bool] = True

    def run(self, ctx: StepContext[DedupConfig]) -> None:
        paths = shard_paths(ctx.inputs["documents"].folder)
        shards: list[Row] = [{"shard": i, "path": str(p), "size": p.stat().st_size} for i, p in enumerate(paths)]
        work = ctx.folder / ".signatures"
        sign = partial(_sign_shard, folder=str(work), config=ctx.config)
        map_shards(ctx, "signing", shards, sign, "bytes", lambda row: row["size"])
        signatures = _read_signatures(work, paths)
        removed, clusters = find_duplicates(signatures, ctx.config)
        write_parquet(ctx.folder / "removed.parquet", removed)
        apply = partial(_keep_shard, folder=str(ctx.folder))
        rows = map_shards(ctx, "writing", shards, apply, "bytes", lambda row: row["size"])
        shutil.rmtree(work)
        why = removed["reason"].to_pylist()
        ctx.counts |= {
            "in:documents": len(signatures.ids),
            "out:documents": sum(row["kept"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows),
            "exact": why.count("exact"),
            "near": why.count("near"),
            "clusters": clusters,
        }
        ctx.outcome = f"removed {why.count('exact')} exact, {why.count('near')} near, in {clusters} clusters"


def find_duplicates(signatures: Signatures, config: DedupConfig) -> tuple[pa.Table, int]:
    """The documents to remove (id, reason, representative, similarity estimate) and the number of clusters."""
    n = len(signatures.ids)
    exact = _exact_edges(signatures.hashes)
    first = sorted({a for a, _ in exact} | set(range(n)) - {b for _, b in exact})
    near = _near_edges(signatures.minima, first, config)
    labels = _components(n, exact + near)
    order = _keep_order(signatures, config)
    representative: dict[int, int] = {}
    for i in order:
        representative.setdefault(labels[i], i)
    gone = sorted((i for i in range(n) if representative[labels[i]] != i), key=lambda i: signatures.ids[i])
    kept = [representative[labels[i]] for i in gone]
    same = [signatures.hashes[i] == signatures.hashes[k] for i, k in zip(gone, kept, strict=True)]
    match = signatures.minima[gone] == signatures.minima[kept]
    table = pa.table(
        {
            "id": pa.array([signatures.ids[i] for i in gone], pa.string()),
            "reason": pa.array(["exact" if s else "near" for s in same], pa.string()),
            "representative": pa.array([signatures.ids[k] for k in kept], pa.string()),
            "similarity": pa.array(match.mean(axis=1) if gone else np.zeros(0), pa.float64()),
        }
    )
    return table, len({labels[i] for i in gone})


def minima_of(texts: list[str], config: DedupConfig) -> npt.NDArray[np.uint64]:
    """MinHash minima [n, bands * rows] of each text's word n-grams; a text shorter than n words is one shingle."""
    from datasketch import MinHash

    shingles = []
    for text in texts:
        words = text.lower().split()
        n = config.shingle_words
        grams = {" ".join(words[i : i + n]).encode() for i in range(max(1, len(words) - n + 1))}
        shingles.append(sorted(grams))
    count = config.bands * config.rows
    made: Any = MinHash.bulk(shingles, num_perm=count, seed=config.seed, hashfunc=_hash, scheme=_SCHEME)
    if not made:
        return np.zeros((0, count), np.uint64)
    return np.stack([sketch.hashvalues for sketch in made]).astype(np.uint64)


def _hash(data: bytes) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def _exact_edges(hashes: list[str]) -> list[tuple[int, int]]:
    """A star from the first document with a hash to each later one."""
    first: dict[str, int] = {}
    edges = []
    for i, value in enumerate(hashes):
        if first.setdefault(value, i) != i:
            edges.append((first[value], i))
    return edges


def _near_edges(minima: npt.NDArray[np.uint64], members: list[int], config: DedupConfig) -> list[tuple[int, int]]:
    """Pairs of `members` that share a band, found by datasketch's LSH index."""
    from datasketch import MinHash, MinHashLSH

    index: Any = MinHashLSH(num_perm=config.bands * config.rows, params=(config.bands, config.rows))
    edges = []
    for i in members:
        sketch = MinHash(seed=config.seed, hashvalues=minima[i], hashfunc=_hash, scheme=_SCHEME)
        edges += [(other, i) for other in sorted(index.query(sketch))]
        index.insert(i, sketch, check_duplication=False)
    return edges


def _components(n: int, edges: list[tuple[int, int]]) -> list[int]:
    """A component label for each of n documents."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    a, b = np.array(edges, np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(n, n))
    return list(connected_components(graph, directed=False)[1])


def _keep_order(signatures: Signatures, config: DedupConfig) -> list[int]:
    """All documents, the one to keep of any cluster first."""
    rank = {source: i for i, source in enumerate(config.prefer)}

    def key(i: int) -> tuple[int, int, str, str]:
        source = rank.get(signatures.sources[i], len(rank))
        return source, -int(signatures.lengths[i]), signatures.hashes[i], signatures.ids[i]

    return sorted(range(len(signatures.ids)), key=key)


def _sign_shard(shard: Row, folder: str, config: DedupConfig) -> Row:
    """Writes the signature rows of one shard. Runs in a Ray worker."""
    table = read_shard(Path(shard["path"]), ["id", "text", "source"])
    texts = [text.as_py() for text in table["text"]]
    minima = minima_of(texts, config)
    signed = pa.table(
        {
            "id": table["id"],
            "source": table["source"],
            "hash": pa.array([content_hash(text) for text in texts], pa.string()),
            "length": pa.array([len(text) for text in texts], pa.int64()),
            "minima": pa.FixedSizeListArray.from_arrays(pa.array(minima.ravel(), pa.uint64()), minima.shape[1]),
        }
    )
    write_parquet(Path(folder) / Path(shard["path"]).name, signed)
    return {"shard": shard["shard"], "documents": len(texts)}


def _read_signatures(folder: Path, paths: list[Path]) -> Signatures:
    table = pa.concat_tables([read_shard(folder / path.name) for path in paths]).combine_chunks()
    minima = table["minima"].combine_chunks()
    width = minima.type.list_size
    return Signatures(
        ids=table["id"].to_pylist(),
        sources=table["source"].to_pylist(),
        hashes=table["hash"].to_pylist(),
        lengths=table["length"].to_numpy(),
        minima=minima.flatten().to_numpy().reshape(-1, width),
    )


def _keep_shard(shard: Row, folder: str) -> Row:
    """Writes one shard without the removed documents. Runs in a Ray worker."""
    path = Path(shard["path"])
    removed = set(read_shard(Path(folder) / "removed.parquet", ["id"])["id"].to_pylist())
    table = read_shard(path)
    kept = table.filter(pa.array([i.as_py() not in removed for i in table["id"]]))
    write_shard(Path(folder) / path.name, kept)
    return {
        "shard": shard["shard"],
        "kept": kept.num_rows,
        "bytes": text_bytes(text.as_py() for text in kept["text"]),
    }


step = Dedup()
