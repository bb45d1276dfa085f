"""Peers of fuzzy dedup on one job: from texts in memory to pairs of documents that share a band, and their clusters.

Each peer uses 5-grams of words, 14 bands of 8 rows, one thread, and its library's fastest documented way to process a
list of texts. Runs in the peers' environment (`make bench-peers`) and prints one JSON line.

Usage: python dedup.py NAME TEXTS.parquet
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

SIZE, BANDS, ROWS = 5, 14, 8


class Clusters:
    """Union-find over documents."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def root(self, a: int) -> int:
        while self.parent[a] != a:
            self.parent[a] = self.parent[self.parent[a]]
            a = self.parent[a]
        return a

    def join(self, pairs: Iterable[tuple[int, int]]) -> None:
        for one, other in pairs:
            a, b = sorted((self.root(one), self.root(other)))
            self.parent[b] = a

    def removed(self) -> int:
        return sum(self.root(i) != i for i in range(len(self.parent)))


def shingles(text: str) -> set[str]:
    words = text.lower().split()
    return {" ".join(words[i : i + SIZE]) for i in range(max(1, len(words) - SIZE + 1))}


def join_equal_bands(clusters: Clusters, digests: Any) -> None:
    """Joins documents that share a band. digests: integers [documents, BANDS * ROWS]."""
    for band in range(BANDS):
        seen: dict[bytes, int] = {}
        part = digests[:, band * ROWS : (band + 1) * ROWS]
        clusters.join((seen.setdefault(row.tobytes(), i), i) for i, row in enumerate(part))


def datasketch_lsh(texts: list[str]) -> int:
    """Number of documents removed with datasketch's own LSH index and the defaults of its MinHash."""
    from datasketch import MinHash, MinHashLSH

    made = MinHash.bulk(([one.encode() for one in shingles(text)] for text in texts), num_perm=BANDS * ROWS)
    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    clusters = Clusters(len(texts))
    for i, one in enumerate(made):
        clusters.join((i, other) for other in index.query(one))
        index.insert(i, one)
    return clusters.removed()


def datasketch(texts: list[str]) -> int:
    """Number of documents removed with its fastest scheme and a fast hash. A dictionary per band replaces its index."""
    import numpy as np
    import xxhash
    from datasketch import MinHash

    made = MinHash.bulk(
        ([one.encode() for one in shingles(text)] for text in texts),
        num_perm=BANDS * ROWS,
        scheme="affine32",
        hashfunc=lambda data: xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF,
    )
    clusters = Clusters(len(texts))
    join_equal_bands(clusters, np.stack([one.hashvalues for one in made]))
    return clusters.removed()


def rensa(texts: list[str]) -> int:
    from rensa import RMinHash, RMinHashLSH

    made = RMinHash.from_token_sets((list(shingles(text)) for text in texts), BANDS * ROWS, 1)
    index = RMinHashLSH(0.7, BANDS * ROWS, BANDS)
    index.insert_pairs(list(enumerate(made)))
    clusters = Clusters(len(texts))
    for i, found in enumerate(index.query_all(made)):
        clusters.join((i, other) for other in found)
    return clusters.removed()


def daft(texts: list[str]) -> int:
    import daft as library
    import numpy as np
    from daft.functions import minhash, normalize

    column = normalize(library.col("text"), lowercase=True, white_space=True)
    frame = library.from_pydict({"text": texts})
    sketch = minhash(column, num_hashes=BANDS * ROWS, ngram_size=SIZE, hash_function="xxhash3_64")
    made = frame.select(sketch.alias("minhash")).to_arrow()["minhash"].combine_chunks()
    clusters = Clusters(len(texts))
    join_equal_bands(clusters, made.flatten().to_numpy().reshape(len(texts), -1).astype(np.uint32))
    return clusters.removed()


def datatrove(texts: list[str]) -> int:
    """Number of documents removed by datatrove. The time includes its file I/O. Words are split at white space."""
    import pyarrow as pa
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer
    from loguru import logger

    class Spaces(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    logger.remove()
    config = MinhashConfig(SIZE, BANDS, ROWS, hash_config=HashConfig(32, "xxhash"))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "in").mkdir()
        pq.write_table(pa.table({"id": [str(i) for i in range(len(texts))], "text": texts}), root / "in" / "0.parquet")
        signature = MinhashDedupSignature(str(root / "signatures"), config, language=Spaces())  # type: ignore[arg-type]
        for number, steps, tasks in (
            (0, [ParquetReader(str(root / "in")), signature], 1),
            (1, [MinhashDedupBuckets(str(root / "signatures"), str(root / "buckets"), config=config)], BANDS),
            (2, [MinhashDedupCluster(str(root / "buckets"), str(root / "removed"), config)], 1),
        ):
            LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(root / f"logs-{number}")).run()
        return sum(path.stat().st_size // 4 for path in (root / "removed").glob("*.remove"))


PEERS: dict[str, Callable[[list[str]], int]] = {
    "datasketch": datasketch, "datasketch-lsh": datasketch_lsh, "rensa": rensa, "daft": daft, "datatrove": datatrove
}  # fmt: skip


OF_SETS = {datasketch, datasketch_lsh, rensa}  # peers that start from the sets made by `shingles`


def main(name: str, path: str) -> None:
    texts = pq.read_table(path)["text"].to_pylist()
    PEERS[name](texts[:50])  # imports, compiles and warms up
    began = time.process_time()
    removed = PEERS[name](texts)
    result = {"cpu_s": time.process_time() - began, "removed": removed}
    if PEERS[name] in OF_SETS:
        began = time.process_time()
        for text in texts:
            shingles(text)
        result["shingling_cpu_s"] = time.process_time() - began
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
