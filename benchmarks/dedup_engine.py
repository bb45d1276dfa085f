"""Fuzzy dedup from texts in memory to removed documents: CPU-seconds of Moray and its peers, one thread each.

All engines use the same 5-grams, bands and rows per band on the same texts (harness/texts.py). Peers start from Python
strings, their input type. Moray starts from Arrow memory, as Parquet is read, and verifies candidates, which the peers
do not. Daft is the closest peer, because its kernel also reads Arrow memory and computes its own shingles. rensa and
datasketch take sets of strings, so part of their time is this benchmark's shingling in Python, which is also measured
separately. Most of datatrove's time is file input and output. The peers run in a separate environment:
`make bench-peers`.

Usage: python benchmarks/dedup_engine.py [MEGABYTES=60] [ROUNDS=3]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from dedup_quality import documents_of
from harness.result import Bar, report
from harness.texts import texts as texts_for

from moray.pipelines.dedup.find import find, near_candidates
from moray.pipelines.text.minhash import Shingling
from moray.pipelines.text.shingles import similarities

HERE = Path(__file__).resolve().parent
PEERS = {  # goals for the peer's CPU-seconds divided by Moray's
    "daft": 8.0, "rensa": 8.0, "datasketch-lsh": 35.0, "datasketch": 35.0, "datatrove": 45.0
}  # fmt: skip


def ours(path: str) -> dict[str, Any]:
    """CPU-seconds and the number of removed documents."""
    column = pq.read_table(path)["text"]
    texts = column.to_pylist()
    run(column.slice(0, 50), texts[:50])  # compiles
    began = time.process_time()
    removed = run(column, texts)
    return {"cpu_s": time.process_time() - began, "removed": removed}


def run(column: pa.ChunkedArray, texts: list[str]) -> int:
    shingling = Shingling(bands=14, rows=8)  # as the peers use
    keys, shingles = shingling.keys(column)
    documents, order = documents_of(texts).in_priority_order()
    near = near_candidates(documents, keys[order], shingles[order])
    wanted = np.unique(near.pairs)
    sets, bounds = shingling.sets(column.take(pa.array(order[wanted])))
    places = np.zeros((len(texts), 2), np.int64)
    places[wanted, 0], places[wanted, 1] = bounds[:-1], bounds[1:]
    return len(find(documents, near.pairs, similarities(near.pairs, places, sets, False), 0.7).removed)


def measured(command: list[str]) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "DAFT_RUNNER": "native"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(megabytes: str = "60", rounds: str = "3") -> int:
    python = HERE / "peers" / ".venv" / "bin" / "python"
    if not python.exists():
        raise SystemExit("error: the peers are not installed: make bench-peers")
    texts = texts_for(float(megabytes))
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/texts.parquet"
        pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), path)
        commands = {name: [str(python), str(HERE / "peers" / "dedup.py"), name, path] for name in PEERS}
        commands["moray"] = [sys.executable, __file__, "--ours", path]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for _ in range(int(rounds)):
            for name, command in commands.items():
                found[name].append(measured(command))
    cpu = {name: statistics.median(one["cpu_s"] for one in runs) for name, runs in found.items()}
    rows: list[dict[str, Any]] = [
        {
            "engine": name,
            "cpu_s": took,
            "shingling_cpu_s": statistics.median(one.get("shingling_cpu_s", 0.0) for one in found[name]),
            "MB_per_cpu_s": size / took,
            "removed": found[name][0]["removed"],
        }
        for name, took in cpu.items()
    ]
    rows.append({"documents": len(texts), "MB": size})
    bars = [Bar(f"{name} over moray", cpu[name] / cpu["moray"], goal, "higher") for name, goal in PEERS.items()]
    return report("dedup_engine", rows, bars)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        print(json.dumps(ours(sys.argv[2])))
    else:
        sys.exit(main(*sys.argv[1:]))
