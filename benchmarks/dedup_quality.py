"""Recall and precision of near-duplicate detection, compared with all pairs, and the cost of verification.

The texts are half of the built corpus, or the texts of this environment (harness/texts.py), without exact copies. Their
real near duplicates are versions of one documentation, vendored copies and licenses. The reference compares all pairs
exactly, without sketches, by a product of sparse document-shingle matrices. Recall is measured by cluster: the share of
the pairs above a similarity that end up in one cluster, for five seeds. Precision is the share of verified pairs that
an oracle of plain Python strings also finds similar. The oracle shares no code with dedup. The bars apply to the
default bands and rows per band. Additional result rows cover FineWeb's choice, 14 bands of 8 rows.

Usage: python benchmarks/dedup_quality.py [MEGABYTES=120]
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
from harness.result import Bar, report
from harness.texts import texts as texts_for
from scipy.sparse import csr_matrix, triu

from moray.pipelines.dedup.find import Found, find, near_candidates
from moray.pipelines.dedup.graph import components
from moray.pipelines.dedup.priority_order import DocumentColumns
from moray.pipelines.shared.documents import content_hash
from moray.pipelines.text.minhash import Shingling
from moray.pipelines.text.shingles import similarities
from tests.pipelines.dedup.oracle import jaccard, shingles

SEEDS = range(1, 6)
LEAST = 0.7
BARS = {0.9: 1.0, 0.8: 0.997, 0.72: 0.975}
RATES = {"small clusters": 30.0, "a shuffled chain": 15.0, "a random graph": 10.0}
SAMPLE = 2000  # number of verified pairs that the oracle compares


def exact_pairs(sets: Any, bounds: Any) -> tuple[Any, Any]:
    """All pairs of documents, [E, 2], with a Jaccard similarity of at least LEAST, and their similarities, [E]."""
    sizes = np.diff(bounds)
    names, columns, seen = np.unique(sets, return_inverse=True, return_counts=True)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    twice = seen[columns] > 1
    matrix = csr_matrix((np.ones(twice.sum(), np.int32), (rows[twice], columns[twice])), shape=(len(sizes), len(names)))
    common = triu(matrix @ matrix.T, 1).tocoo()
    alike = common.data / (sizes[common.row] + sizes[common.col] - common.data)
    chosen = alike >= LEAST
    return np.stack((common.row[chosen], common.col[chosen]), axis=1).astype(np.int64), alike[chosen]


def documents_of(texts: list[str]) -> DocumentColumns:
    count = len(texts)
    return DocumentColumns(
        ids=np.arange(count).astype("S32"),
        hashes=np.array([content_hash(t) for t in texts], "S"),
        sources=np.zeros(count, np.int64),
        qualities=np.zeros(count),
        lengths=np.array([len(t) for t in texts]),
    )


def main(megabytes: str = "120") -> int:
    texts = list(dict.fromkeys(texts_for(float(megabytes))))  # exact copies would count as pairs that are always found
    column = pa.chunked_array([pa.array(texts, pa.large_string())])
    size = sum(len(text.encode()) for text in texts)
    sets, bounds = Shingling().sets(column)
    began = time.process_time()
    pairs, alike = exact_pairs(sets, bounds)
    oracle_seconds = time.process_time() - began
    Shingling().keys(column.slice(0, 1))  # compiles
    similarities(pairs[:0], np.zeros((0, 2), np.int64), sets, False)
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        rows.append(one_seed(texts, column, pairs, alike, Shingling(seed=seed)))
        rows[-1]["MB_per_cpu_s"] = size / 1e6 / rows[-1]["sign_s"]
    usual = [one_seed(texts, column, pairs, alike, Shingling(bands=14, rows=8, seed=seed)) for seed in SEEDS]
    bars = [
        Bar(
            f"recall by cluster of pairs >= {s}, least of the seeds",
            min(row[f"recall_{s}"] for row in rows),
            goal,
            "higher",
        )
        for s, goal in BARS.items()
    ]
    bars += [
        Bar(
            "precision of verified pairs by an independent oracle, least",
            min(row["precision"] for row in rows),
            1.0,
            "higher",
        ),
        Bar("documents removed without a partner, most", max(row["without_partner"] for row in rows), 0.0, "lower"),
        Bar(
            "verification over signing and banding, CPU time",
            statistics.median(row["verify_share"] for row in rows),
            0.25,
            "lower",
        ),
    ]
    rates = {name: edges_per_second(pairs) for name, pairs in graphs().items()}
    bars += [
        Bar(f"millions of edges per CPU-second, {name}", rates[name] / 1e6, goal, "higher")
        for name, goal in RATES.items()
    ]
    rows += usual
    rows.append(
        {"documents": len(texts), "MB": size / 1e6, "pairs": len(pairs), "exact_comparison_cpu_s": oracle_seconds}
    )
    return report("dedup_quality", rows, bars)


def precision(texts: list[str], pairs: Any, seed: int) -> float:
    """The share of SAMPLE of the pairs [E, 2] that the oracle finds at least as similar as LEAST."""
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:SAMPLE]
    sets = {int(one): shingles(texts[one], Shingling().size) for one in np.unique(pairs[chosen])}
    similar = [jaccard(sets[int(one)], sets[int(other)]) >= LEAST - 1e-9 for one, other in pairs[chosen]]
    return sum(similar) / max(1, len(similar))


def graphs() -> dict[str, Any]:
    """Edges [E, 2] of graphs by name: typical clusters, and hard cases with edges in random order."""
    generator, count = np.random.default_rng(1), 4_000_000
    chain = generator.permutation(np.stack((np.arange(count - 1), np.arange(1, count)), axis=1))
    return {
        "small clusters": np.stack((np.arange(count), np.arange(count) // 5 * 5), axis=1),
        "a shuffled chain": np.ascontiguousarray(chain),
        "a random graph": generator.integers(0, count, (count, 2)),
    }


def edges_per_second(pairs: Any) -> float:
    components(2, pairs[:1] * 0)  # compiles
    began = time.process_time()
    components(int(pairs.max()) + 1, pairs)
    return float(len(pairs) / (time.process_time() - began))


def one_seed(texts: list[str], column: pa.ChunkedArray, pairs: Any, alike: Any, shingling: Shingling) -> dict[str, Any]:
    began = time.process_time()
    keys, shingles = shingling.keys(column)
    signed = time.process_time()
    ordered, order = documents_of(texts).in_priority_order()
    near = near_candidates(ordered, keys[order], shingles[order])
    sketched = time.process_time()
    wanted = np.unique(near.pairs)
    own_sets, own_bounds = shingling.sets(column.take(pa.array(order[wanted])))
    places = np.zeros((len(texts), 2), np.int64)
    places[wanted, 0], places[wanted, 1] = own_bounds[:-1], own_bounds[1:]
    scores = similarities(near.pairs, places, own_sets, False)
    verified = time.process_time()
    found: Found = find(ordered, near.pairs, scores, LEAST)
    keep_index = np.argsort(order)
    together = found.labels[keep_index[pairs[:, 0]]] == found.labels[keep_index[pairs[:, 1]]]
    verified_pairs = order[near.pairs[scores >= LEAST]]
    row: dict[str, Any] = {f"recall_{s}": float(together[alike >= s].mean()) for s in BARS}
    theory = 1 - (1 - alike[alike >= min(BARS)] ** shingling.rows) ** shingling.bands
    return {
        "bands": shingling.bands,
        "rows": shingling.rows,
        "seed": shingling.seed,
        **row,
        "share_a_key_by_theory": float(theory.mean()),
        "candidates": len(near.pairs),
        "removed": len(found.removed),
        "precision": precision(texts, verified_pairs, shingling.seed),
        "without_partner": int((found.removed["similarity"].to_numpy() < LEAST).sum()),
        "sign_s": signed - began,
        "verify_share": (verified - sketched) / (sketched - began),
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
