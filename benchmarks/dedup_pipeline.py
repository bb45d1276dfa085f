"""Fuzzy dedup from Parquet to Parquet on two cores: Moray on Ray, compared with datatrove's local executor.

datatrove runs two workers. The input is the corpus that `make bench-corpus` builds, and a version four times as large.
The large version is the corpus plus three copies whose letters are substituted within each script, so that a copy has
the same duplicates within itself and none in the others. A bar checks that four times as many documents are removed.
Both engines use datatrove's 14 bands of 8 rows. Moray verifies candidates; datatrove does not. Moray's time includes
the start of Ray, which is also reported separately. The peak use of the object store shows that no text passes through
it.

Usage: python benchmarks/dedup_pipeline.py [CORPUS] [ROUNDS=3]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from harness.result import Bar, report

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus" / ".cache" / "documents"


class Watch(threading.Thread):
    """Samples the peak memory of a Ray worker and the peak use of the object store, in bytes."""

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

    home = Home(Path(out).parent / "home")  # shared by all rounds, so that numba compiles only in the first
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
        config=DedupConfig(bands=14, rows=8),  # as datatrove uses
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
    """Writes the corpus and three copies in other letters. Duplicates span files, so a copy has one table for all."""
    paths = sorted(source.glob("documents-*.parquet"))
    letters: set[str] = set()
    for path in paths:
        letters.update(*(text.as_py() for text in pq.read_table(path, columns=["text"])["text"]))
    tables = other_letters(letters)
    for path in paths:
        documents = pq.read_table(path)
        texts = documents["text"].to_pylist()
        pq.write_table(documents, out / f"{path.stem}-0.parquet", compression="zstd")
        for number, table in enumerate(tables, 1):
            for name, values in (
                ("text", pa.array([text.translate(table) for text in texts], pa.large_string())),
                ("id", pa.array([f"{number}{name.as_py()[1:]}" for name in documents["id"]])),
            ):
                documents = documents.set_column(documents.schema.get_field_index(name), name, values)
            pq.write_table(documents, out / f"{path.stem}-{number}.parquet", compression="zstd")


def other_letters(letters: set[str]) -> list[dict[int, int]]:
    """Three tables for `str.translate` that exchange letters and digits within a script.

    Every word of a copy differs from the original word. A text keeps its size in UTF-8.
    """
    groups: dict[tuple[int, str, int], list[str]] = defaultdict(list)
    for letter in sorted(letters):
        kind = unicodedata.category(letter)
        if kind[0] == "L" or kind == "Nd":
            # The two cases of a letter stay paired: "a" and "A" become "f" and "F".
            cased = "cased" if kind in ("Lu", "Ll") and len(letter.swapcase()) == 1 else kind
            if cased != "cased" or letter.islower():
                ideograph = 0x3400 <= ord(letter) < 0xA000
                groups[len(letter.encode()), cased, 0 if ideograph else ord(letter) >> 8].append(letter)
    tables: list[dict[int, int]] = [{}, {}, {}]
    for group in groups.values():
        for number, table in enumerate(tables, 1):
            shift = number * max(1, len(group) // 4)
            for at, letter in enumerate(group):
                other = group[(at + shift) % len(group)]
                table[ord(letter)] = ord(other)
                upper, other_upper = letter.upper(), other.upper()
                if letter.islower() and len(upper) == 1 and len(other_upper) == 1 and upper != letter:
                    table[ord(upper)] = ord(other_upper)
    return tables


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
    found: dict[str, list[dict[str, Any]]] = {"moray": [], "datatrove": [], "moray, 4x": [], "datatrove, 4x": []}
    with tempfile.TemporaryDirectory() as name:
        at = Path(name)
        for number in range(int(rounds)):
            out = str(at / f"{number}")
            found["moray"].append(measured([sys.executable, __file__, "--ours", corpus, out]))
            found["datatrove"].append(measured([*peer, corpus, str(at / f"peer-{number}")]))
            if number == 0:
                (at / "four").mkdir()
                four_times(Path(corpus), at / "four")
            found["moray, 4x"].append(measured([sys.executable, __file__, "--ours", str(at / "four"), f"{out}-four"]))
            found["datatrove, 4x"].append(measured([*peer, str(at / "four"), str(at / f"peer-four-{number}")]))
            for done in (f"{number}", f"peer-{number}", f"{number}-four", f"peer-four-{number}"):
                shutil.rmtree(at / done, ignore_errors=True)
    middle = {name: sorted(runs, key=lambda run: run["wall_s"])[len(runs) // 2] for name, runs in found.items()}
    rows = [{"engine": name, "MB": size * (4 if "4x" in name else 1), **row} for name, row in middle.items()]
    ours_, large = middle["moray"], middle["moray, 4x"]
    stored = max(ours_["store_MB"] / size, large["store_MB"] / (4 * size))
    bars = [
        Bar("datatrove over moray", middle["datatrove"]["wall_s"] / ours_["wall_s"], 3.0, "higher"),
        Bar(
            "datatrove over moray, 4 times the data", middle["datatrove, 4x"]["wall_s"] / large["wall_s"], 3.0, "higher"
        ),
        Bar(
            "removed documents at 4 times the data, deviation from 4",
            abs(large["removed"] / ours_["removed"] / 4 - 1),
            0.02,
            "lower",
        ),
        Bar("memory of the largest worker, MB", max(large["worker_MB"], ours_["worker_MB"]), 1000.0, "lower"),
        Bar("memory of the largest worker, growth at 4 times", large["worker_MB"] / ours_["worker_MB"], 1.15, "lower"),
        Bar("object store in use, MB", max(large["store_MB"], ours_["store_MB"]), 0.5, "lower"),
        Bar("object store in use, share of the text", stored, 0.001, "lower"),
    ]
    return report("dedup_pipeline", rows, bars, ["moray.pipelines.dedup.step"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        print(json.dumps(ours(*sys.argv[2:])))
    else:
        sys.exit(main(*sys.argv[1:]))
