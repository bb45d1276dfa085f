"""Finds accepted items that copy an earlier item (equal bytes) or a corpus document (equal or similar text).

Items are compared with each other by equality only, because items of one task are similar by design. The corpus is
read once, shard by shard, with dedup's MinHash kernel. Documents that share a band key with an item are compared
exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from moray.pipelines.shared.documents import content_hash, read_shard, write_parquet
from moray.pipelines.shared.shards import Row, shard_path
from moray.pipelines.synthesize.items import FinishedItem, Log
from moray.pipelines.text.minhash import Shingling
from moray.platform.store.paths import AnyPath, any_path

_SHINGLING = Shingling()


def accepted(log: Log) -> list[FinishedItem]:
    """The accepted items of a log, ordered by number."""
    made = [one for one in log.read().values() if not one.reason]
    return sorted(made, key=lambda one: int(one.key.rpartition("/")[2]))


def sketch_shard(shard: Row, folder: AnyPath) -> Row:
    """Writes key, hash, text and band keys of a shard's accepted items. Runs in a Ray worker."""
    made = accepted(Log(any_path(shard["log"])))
    texts = pa.chunked_array([pa.array([one.text for one in made], pa.large_string())])
    keys, shingles = _SHINGLING.keys(texts)
    sketch = pa.table(
        {
            "key": pa.array([one.key for one in made], pa.string()),
            "hash": pa.array([content_hash(one.text) for one in made], pa.string()),
            "text": texts,
            "shingles": pa.array(shingles, pa.int64()),
            "keys": pa.FixedSizeListArray.from_arrays(pa.array(keys.ravel(), pa.uint64()), _SHINGLING.bands),
        }
    )
    write_parquet(sketch_path(folder, shard["shard"]), sketch)
    return {"shard": shard["shard"]}


def sketch_path(folder: AnyPath, shard: int) -> AnyPath:
    return folder / f"sketch-{shard:05d}.parquet"


def compare_shard(shard: Row, sketches: list[AnyPath], similarity: float) -> Row:
    """Finds items that a corpus shard also has. Runs in a Ray worker.

    Returns `copies`, a JSON list of [item key, document id, similarity].
    """
    corpus = read_shard(shard_path(shard), ["id", "text"])
    columns = ["key", "hash", "shingles", "keys"]
    made = pa.concat_tables([read_shard(path, columns) for path in sketches])
    if not made.num_rows:
        return {"shard": shard["shard"], "copies": "[]"}
    ids = corpus["id"].to_pylist()
    hashes = {content_hash(text.as_py()): ids[row] for row, text in enumerate(corpus["text"])}
    keys = made["key"].to_pylist()
    copies = [[keys[at], hashes[own], 1.0] for at, own in enumerate(made["hash"].to_pylist()) if own in hashes]
    if similarity:
        pairs = _candidates(corpus["text"], made)
        texts = pa.concat_tables([read_shard(path, ["text"]) for path in sketches])["text"]
        copies += [
            [keys[at], ids[row], score]
            for (at, row), score in zip(pairs, _similarities(pairs, texts, corpus["text"]), strict=True)
            if score >= similarity
        ]
    return {"shard": shard["shard"], "copies": json.dumps(copies)}


def _candidates(texts: pa.ChunkedArray, made: pa.Table) -> list[tuple[int, int]]:
    """(item, row of the corpus) pairs that share a band key."""
    keys, shingles = _SHINGLING.keys(texts)
    own = made["keys"].combine_chunks().flatten().to_numpy().reshape(-1, _SHINGLING.bands)
    some = made["shingles"].to_numpy() > 0
    found: set[tuple[int, int]] = set()
    for band in range(_SHINGLING.bands):
        rows = np.flatnonzero(np.isin(keys[:, band], own[some, band]) & (shingles > 0))
        for row in rows.tolist():
            found |= {(int(at), row) for at in np.flatnonzero((own[:, band] == keys[row, band]) & some)}
    return sorted(found)


def _similarities(pairs: list[tuple[int, int]], texts: pa.ChunkedArray, corpus: pa.ChunkedArray) -> list[float]:
    from moray.pipelines.text.shingles import in_common

    scores = []
    for at, row in pairs:
        sets, bounds = _SHINGLING.sets(pa.chunked_array([pa.concat_arrays([_one(texts, at), _one(corpus, row)])]))
        one, other = sets[bounds[0] : bounds[1]], sets[bounds[1] : bounds[2]]
        common = in_common(one, other)
        scores.append(round(common / (len(one) + len(other) - common), 4))
    return scores


def _one(texts: pa.ChunkedArray, at: int) -> pa.Array:
    return pa.array([texts[at].as_py()], pa.large_string())


def repeated_documents(sketches: Iterable[AnyPath]) -> dict[str, str]:
    """Maps each item whose bytes equal an earlier item to the key of that item. Sketches are in the recipe's order."""
    first: dict[str, str] = {}
    again = {}
    for path in sketches:
        table = read_shard(path, ["key", "hash"])
        for key, own in zip(table["key"].to_pylist(), table["hash"].to_pylist(), strict=True):
            if own in first:
                again[key] = first[own]
            else:
                first[own] = key
    return again
