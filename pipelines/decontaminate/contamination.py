"""Which documents are contaminated, and by what, given all matches: a pure function, so nothing depends on the shards.

Shapes: I items.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from moray.pipelines.decontaminate.eval_index import EvalIndex

REASON = "contaminated"
_EXCERPT = 300  # characters of an excerpt in tables

MATCHES = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("gram", pa.int64()),
        pa.field("place", pa.int64()),
        pa.field("text", pa.large_string()),
    ]
)
HITS = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("eval", pa.string()),
        pa.field("item", pa.string()),
        pa.field("ngrams", pa.int64()),
        pa.field("overlap", pa.float64()),
        pa.field("text", pa.large_string()),
        pa.field("contaminated", pa.bool_()),
    ]
)
REMOVED = pa.schema([HITS.field("id"), pa.field("reason", pa.string()), *[HITS.field(i) for i in range(2, 7)]])


@dataclass(frozen=True)
class ContaminationResult:
    """hits: a row per document and item, see HITS. removed: a row per document, by the item it has most of.

    ignored: n-grams that more documents have than are believed, as written in one of them, and how many do.
    """

    hits: pa.Table
    removed: pa.Table
    ignored: list[tuple[str, int]]


def find_contamination(
    matches: pa.Table, index: EvalIndex, max_overlap: float, ignore_common: int | None
) -> ContaminationResult:
    """matches: see MATCHES, each document and n-gram once. A document is contaminated if it has more than `max_overlap`
    of an item, a share of the item's n-grams; those that more than `ignore_common` documents have count nowhere."""
    rows = sorted(matches.to_pylist(), key=lambda row: (row["id"], row["gram"]))
    documents = Counter(row["gram"] for row in rows)
    common = {gram for gram, n in documents.items() if ignore_common is not None and n > ignore_common}
    excerpts = {row["gram"]: row["text"] for row in reversed(rows) if row["gram"] in common}
    wholes = index.grams_of_items(sorted(common))
    items: dict[tuple[int, int], list[int]] = {}
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        place = (row["gram"], row["place"])
        if row["gram"] in common:
            continue
        if place not in items:
            items[place] = index.items_with(*place)
        for item in items[place]:
            found[row["id"], item].append(row)
    hits = [_hit(its, index.items[item], int(wholes[item]), max_overlap) for (_, item), its in found.items()]
    hits.sort(key=lambda hit: (hit["id"], hit["eval"], hit["item"]))
    worst: dict[str, dict[str, Any]] = {}
    for hit in sorted(hits, key=lambda hit: (-hit["overlap"], -hit["ngrams"])):  # stable: then by eval and item
        if hit["contaminated"]:
            worst.setdefault(hit["id"], {**hit, "reason": REASON})
    return ContaminationResult(
        pa.Table.from_pylist(hits, HITS),
        pa.Table.from_pylist([worst[name] for name in sorted(worst)], REMOVED),
        sorted(((excerpts[gram], documents[gram]) for gram in common), key=lambda one: (-one[1], one[0])),
    )


def _hit(rows: list[dict[str, Any]], item: tuple[str, str], whole: int, max_overlap: float) -> dict[str, Any]:
    overlap = len(rows) / whole
    return {
        "id": rows[0]["id"],
        "source": rows[0]["source"],
        "eval": item[0],
        "item": item[1],
        "ngrams": len(rows),
        "overlap": overlap,
        "text": rows[0]["text"][:_EXCERPT],
        "contaminated": overlap > max_overlap,
    }


def per_eval(index: EvalIndex, hits: pa.Table) -> list[dict[str, Any]]:
    """Of each eval: items, those in some document and in none, those too short to be looked for; documents."""
    wholes, rows = index.grams_of_items(), hits.to_pylist()
    report = []
    for name in dict.fromkeys(name for name, _ in index.items):
        own = [(item, int(whole)) for (its, item), whole in zip(index.items, wholes, strict=True) if its == name]
        mine = [row for row in rows if row["eval"] == name]
        touched = Counter(row["item"] for row in mine)
        gone = Counter(row["item"] for row in mine if row["contaminated"])
        short = [item for item, whole in own if not whole]
        report.append(
            {
                "name": name,
                "items": len(own),
                "items_found": len(touched),
                "items_never_found": len(own) - len(touched) - len(short),
                "items_not_looked_for": len(short),
                "documents": len({row["id"] for row in mine}),
                "documents_contaminated": len({row["id"] for row in mine if row["contaminated"]}),
                "found": [
                    {"item": item, "documents": n, "contaminated": gone[item]} for item, n in touched.most_common()
                ],
                "not_looked_for": short,
            }
        )
    return report
