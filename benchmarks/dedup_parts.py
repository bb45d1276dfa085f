"""dedup-parts on real texts, in CPU-seconds: each phase's task over shards, in one process, Parquet to Parquet.

The texts are the built corpus (`make bench-corpus`) or, if it is not built, the texts of this environment. The
measurements include reading, hashing and writing. They exclude Ray, so they are for one core.

Usage: python benchmarks/dedup_parts.py [ROUNDS=3]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from harness.result import report
from harness.texts import BUILT, texts_of

from moray.pipelines.dedup.parts.key_ranges import exchange_ranges
from moray.pipelines.dedup.parts.scan import scan_pieces
from moray.pipelines.dedup.parts.scan_input import read_scan_input
from moray.pipelines.dedup.parts.scan_output import write_scan_output
from moray.pipelines.dedup.parts.step import DedupPartsConfig
from moray.pipelines.dedup.parts.tasks import (
    Folders,
    cut_shard,
    fingerprint_shard,
    match_fingerprints,
    match_pieces,
    part_shard,
    text_size,
    window_shard,
)
from moray.pipelines.dedup.priority_order import PriorityOrder
from moray.pipelines.dedup.removal import read_outputs
from moray.pipelines.shared.documents import document_id, read_shard, shard_name, write_shard
from moray.pipelines.shared.shards import Row

_SHARD = 500  # documents per shard


def write_texts(folder: Path, texts: list[str]) -> list[Path]:
    paths = []
    for number, at in enumerate(range(0, len(texts), _SHARD)):
        part = texts[at : at + _SHARD]
        table = {
            "id": pa.array([document_id("b", str(at + i)) for i in range(len(part))], pa.string()),
            "text": pa.array(part, pa.large_string()),
            "source": pa.array(["b"] * len(part), pa.string()),
            "license": pa.array([""] * len(part), pa.string()),
            "meta": pa.array([[]] * len(part), pa.map_(pa.string(), pa.string())),
        }
        paths.append(folder / shard_name(number))
        write_shard(paths[-1], pa.table(table))
    return paths


def keys(shards: list[Row], folders: Folders, config: DedupPartsConfig) -> int:
    """Runs the phases before the comparison, as the step does; returns the number of ranges."""
    size = sum(text_size(Path(shard["path"])) for shard in shards)
    if config.unit != "substring":
        ranges = exchange_ranges(size / 80)
        for shard in shards:
            part_shard(shard, folders, config.unit, config.min_characters, ranges)
        return ranges
    shared = exchange_ranges(size / 60)
    for shard in shards:
        fingerprint_shard(shard, folders, config.tokens, shared)
    found = sum(match_fingerprints({"shard": number}, folders, shards)["rows"] for number in range(shared))
    for shard in shards:
        window_shard(shard, folders, config.tokens, shared, exchange_ranges(found * 16))
    return exchange_ranges(found * 16)


def run(shards: list[Row], root: Path, config: DedupPartsConfig) -> dict[str, Any]:
    """CPU-seconds of the phases, and the number and size of the removed spans."""
    folders, took = Folders(root), {}
    began = time.process_time()
    ranges = keys(shards, folders, config)
    took["keys_cpu_s"] = time.process_time() - began
    for number in range(ranges):
        match_pieces({"shard": number}, folders, shards)
    order = PriorityOrder.of(read_outputs(root / ".described", shards), ())
    scan = read_scan_input(folders, ranges, order)
    found = scan_pieces(scan.pieces, scan.length_D, scan.words_D, config.copies, config.max_loss, config.min_words)
    write_scan_output(shards, folders, order, scan, found)
    took["decided_cpu_s"] = time.process_time() - began
    for shard in shards:
        cut_shard(shard, folders)
    cut = int(found.lost.sum())
    return {**took, "cpu_s": time.process_time() - began, "spans": int(found.spans.sum()), "cut_MB": cut / 1e6}


def main(rounds: str = "3") -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = sorted(BUILT.glob("documents-*.parquet")) or write_texts(folder / "in", texts_of(60))
        shards: list[Row] = [{"shard": i, "path": str(path)} for i, path in enumerate(paths)]
        sizes = [sum(len(t.as_py().encode()) for t in read_shard(path, ["text"])["text"]) for path in paths]
        rows: list[dict[str, Any]] = []
        for unit in ("line", "paragraph", "substring"):
            config = DedupPartsConfig(unit=unit)  # type: ignore[arg-type]
            run(shards[:1], folder / unit / "compiled", config)
            found = [run(shards, folder / unit / str(number), config) for number in range(int(rounds))]
            median = {key: statistics.median(one[key] for one in found) for key in found[0]}
            rows.append({"unit": unit, **median, "MB_per_cpu_s": sum(sizes) / 1e6 / median["cpu_s"]})
        rows.append({"shards": len(shards), "MB": sum(sizes) / 1e6})
        return report("dedup_parts", rows, [])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
