"""Main text of web pages: Moray's reader compared with trafilatura, in quality and CPU-seconds, one thread each.

The pages are Python's documentation, which `make bench-corpus` fetches: HTML with menus, side bars and footers around
the text. The reference for each page is the reStructuredText source that it was generated from. Both readers get the
same bytes. Quality is the agreement of words (as multisets), averaged over pages. It covers only one site and one
generator, Sphinx. The peer runs in a separate environment: `make bench-peers`.

Usage: python benchmarks/extraction.py [ROUNDS=3]
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from harness.result import Bar, report

from moray.pipelines.corpus.pieces import Document
from moray.pipelines.corpus.web import read_page

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers" / ".venv" / "bin" / "python"
CACHE = HERE / "corpus" / ".cache" / "packages" / "debian"
MAX_BYTES = 10_000_000


def pages() -> list[tuple[bytes, str]]:
    """Pairs (HTML, source) for every page of Python's documentation."""
    sys.path.insert(0, str(HERE / "corpus"))
    from fetch import members

    archives = sorted(CACHE.glob("python3.11-doc_*.deb"))
    if not archives:
        raise SystemExit("error: no packages in benchmarks/corpus/.cache: make bench-corpus")
    root, found = "/usr/share/doc/python3.11/html/", {}
    for name, data in members(archives[-1]):
        found[name.removeprefix(root)] = data
    sources = {name: f"_sources/{name.removesuffix('.html')}.rst.txt" for name in found if name.endswith(".html")}
    return [(found[name], found[source].decode()) for name, source in sorted(sources.items()) if source in found]


def ours(path: str, out: str) -> float:
    """Extracts the pages in `path`, writes their texts to `out`, and returns CPU-seconds."""
    data = pq.read_table(path)["html"].to_pylist()
    read_page(max(data, key=len), MAX_BYTES, "", "")  # also starts the child process that reads long pages
    began = cpu_seconds()
    pieces = [read_page(one, MAX_BYTES, "", "") for one in data]
    took = cpu_seconds() - began
    texts = [piece.text if isinstance(piece, Document) else "" for piece in pieces]
    pq.write_table(pa.table({"text": texts}), out)
    return took


def cpu_seconds() -> float:
    """CPU-seconds used so far by this process and its children."""
    children = (child.cpu_times() for child in psutil.Process().children())
    return time.process_time() + sum(one.user + one.system for one in children)


def agreement(texts: list[str], truths: list[str]) -> dict[str, float]:
    """Precision, recall and F1 of words, each averaged over pages."""
    scores = []
    for text, truth in zip(texts, truths, strict=True):
        one, other = (Counter(re.findall(r"\w+", words.lower())) for words in (text, truth))
        common = (one & other).total()
        precision, recall = common / max(1, one.total()), common / max(1, other.total())
        scores.append((precision, recall, 2 * precision * recall / max(1e-9, precision + recall)))
    return dict(zip(("precision", "recall", "f1"), map(statistics.fmean, zip(*scores, strict=True)), strict=True))


def main(rounds: str = "3") -> int:
    if not PEERS.exists():
        raise SystemExit("error: the peers are not installed: make bench-peers")
    html, truths = zip(*pages(), strict=True)
    size = sum(map(len, html)) / 1e6
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/pages.parquet"
        pq.write_table(pa.table({"html": pa.array(html, pa.large_binary())}), path)
        commands = {
            "moray": [sys.executable, __file__, "--ours", path, f"{folder}/moray.parquet"],
            "trafilatura": [str(PEERS), str(HERE / "peers" / "extraction.py"), path, f"{folder}/trafilatura.parquet"],
        }
        took: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(int(rounds)):
            for name, command in commands.items():
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                took[name].append(json.loads(done.stdout))
        for name in commands:
            cpu = statistics.median(took[name])
            texts = pq.read_table(f"{folder}/{name}.parquet")["text"].to_pylist()
            rows.append({"reader": name, "cpu_s": cpu, "MB_per_cpu_s": size / cpu, **agreement(texts, list(truths))})
    ratio, gain = rows[1]["cpu_s"] / rows[0]["cpu_s"], rows[0]["f1"] - rows[1]["f1"]
    rows.append({"pages": len(html), "MB": size})
    bars = [
        Bar("f1, moray minus trafilatura", gain, 0.0, "higher"),
        Bar("trafilatura over moray", ratio, 8.0, "higher"),
    ]
    return report("extraction", rows, bars)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ours"]:
        print(json.dumps(ours(*sys.argv[2:])))
    else:
        sys.exit(main(*sys.argv[1:]))
