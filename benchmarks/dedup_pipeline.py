"""Fuzzy dedup from Parquet to Parquet on two cores: Moray on Ray against datatrove's local executor with two workers.

On the corpus that `make bench-corpus` builds, once as it is and once four times over (three copies in other letters, so
that they are no duplicates), to see what a worker's memory does. Moray verifies what it finds, datatrove does not.
Starting Ray is in Moray's time, and is also printed apart. The most of the object store that is ever in use tells
whether text travels through it: what lies there are descriptions of shards, and numbers of documents.

Usage: python benchmarks/dedup_pipeline.py [CORPUS] [ROUNDS=3]
"""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from harness.result import Bar, report

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus" / ".cache" / "documents"


class Watch(threading.Thread):
    """The most memory that a worker of Ray held, and the most of the object store that was in use."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.worker_bytes, self.store_bytes = 0, 0.0
        self._done = threading.Event()

    def run(self) -> None:
        import psutil
        import ray

        whole = ray.cluster_resources()["object_store_memory"]
        while not self._done.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name().startswith("ray::"):
                        self.worker_bytes = max(self.worker_bytes, process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            free = ray.available_resources().get("object_store_memory", 0.0)
            self.store_bytes = max(self.store_bytes, whole - free)

    def end(self) -> None:
        self._done.set()
        self.join()


def ours(source: str, out: str) -> dict[str, Any]:
    from moray.pipelines.dedup.config import DedupConfig
    from moray.pipelines.dedup.step import step
    from moray.platform.api import embedded_cluster
    from moray.platform.core.events import EventLog
    from moray.platform.core.home import Home
    from moray.platform.plan.context import StepContext
    from moray.platform.store.artifacts import Artifact
    from moray.platform.store.manifest import Manifest

    home = Home(Path(out).parent / "home")  # of all rounds: what numba compiled in the first is there for the others
    home.root.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(
        step="corpus",
        step_version=1,
        fingerprint="ab",
        produces="documents",
        config={},
        address={},
        files=[],
        bytes=0,
        run="",
        code={},
        environment={},
        started=0.0,
        seconds=0.0,
        cpu_seconds=0.0,
    )
    (Path(out) / "result").mkdir(parents=True)
    cluster = embedded_cluster(home, 2)
    began = time.monotonic()
    cluster.ensure()
    started = time.monotonic()
    watch = Watch()
    watch.start()
    context: StepContext[DedupConfig] = StepContext(
        step="dedup",
        config=DedupConfig(),
        inputs={"documents": Artifact(Path(source), manifest)},
        home=home,
        folder=Path(out) / "result",
        run=Path(out) / "run",
        events=EventLog(Path(out) / "run" / "events", "benchmark"),
        cluster=cluster,
        fingerprint="cd",
    )
    step.run(context)
    ended = time.monotonic()
    watch.end()
    cluster.stop()
    removed = context.counts["exact"] + context.counts["near"]
    return {
        "wall_s": ended - began,
        "start_s": started - began,
        "removed": removed,
        "worker_MB": watch.worker_bytes / 1e6,
        "store_MB": watch.store_bytes / 1e6,
    }


def four_times(source: Path, out: Path) -> None:
    """The corpus, and three copies of it whose letters are turned by a few places."""
    for turn in range(4):
        letters = string.ascii_lowercase
        turned = letters[turn:] + letters[:turn]
        table = str.maketrans(letters + letters.upper(), turned + turned.upper())
        for path in sorted(source.glob("documents-*.parquet")):
            documents = pq.read_table(path)
            if turn:
                texts = [text.as_py().translate(table) for text in documents["text"]]
                at = documents.schema.get_field_index("text")
                documents = documents.set_column(at, "text", pa.array(texts, pa.large_string()))
                ids = pa.array([f"{turn}{name.as_py()[1:]}" for name in documents["id"]])
                documents = documents.set_column(documents.schema.get_field_index("id"), "id", ids)
            pq.write_table(documents, out / f"{path.stem}-{turn}.parquet", compression="zstd")


def measured(command: list[str]) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(corpus: str = str(CORPUS), rounds: str = "3") -> int:
    python = HERE / "peers" / ".venv" / "bin" / "python"
    if not python.exists():
        raise SystemExit("error: the peers are not installed: make bench-peers")
    paths = sorted(Path(corpus).glob("documents-*.parquet"))
    if not paths:
        raise SystemExit(f"error: {corpus} holds no documents: make bench-corpus")
    size = sum(pc.sum(pc.binary_length(pq.read_table(p, columns=["text"])["text"])).as_py() or 0 for p in paths) / 1e6
    peer = [str(python), str(HERE / "peers" / "dedup_pipeline.py")]
    found: dict[str, list[dict[str, Any]]] = {"moray": [], "datatrove": []}
    with tempfile.TemporaryDirectory() as name:
        at = Path(name)
        for number in range(int(rounds)):
            out = str(at / f"{number}")
            found["moray"].append(measured([sys.executable, __file__, "--ours", corpus, out]))
            found["datatrove"].append(measured([*peer, corpus, str(at / f"peer-{number}")]))
        (at / "four").mkdir()
        four_times(Path(corpus), at / "four")
        large = measured([sys.executable, __file__, "--ours", str(at / "four"), str(at / "large")])
        peer_large = measured([*peer, str(at / "four"), str(at / "peer-large")])
    middle = {name: sorted(runs, key=lambda run: run["wall_s"])[len(runs) // 2] for name, runs in found.items()}
    rows = [{"engine": name, "MB": size, **row} for name, row in middle.items()]
    rows += [{"engine": "moray", "MB": 4 * size, **large}, {"engine": "datatrove", "MB": 4 * size, **peer_large}]
    stored = max(middle["moray"]["store_MB"] / size, large["store_MB"] / (4 * size))
    bars = [
        Bar("datatrove over moray", middle["datatrove"]["wall_s"] / middle["moray"]["wall_s"], 3.0, "higher"),
        Bar("the same at four times the data", peer_large["wall_s"] / large["wall_s"], 3.0, "higher"),
        Bar("a worker's most memory, MB", max(large["worker_MB"], middle["moray"]["worker_MB"]), 1500.0, "lower"),
        Bar("it at four times the data, over it", large["worker_MB"] / middle["moray"]["worker_MB"], 1.15, "lower"),
        Bar("MB of the object store in use", max(large["store_MB"], middle["moray"]["store_MB"]), 1.0, "lower"),
        Bar("the object store's bytes over the text's", stored, 0.01, "lower"),
    ]
    return report("dedup_pipeline", rows, bars)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        print(json.dumps(ours(*sys.argv[2:])))
    else:
        sys.exit(main(*sys.argv[1:]))
