"""The decision which documents are contaminated, from all matches at once, so it does not depend on the shards.

Shapes: I items.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from moray.pipelines.decontaminate.eval_index import EvalIndex

REASON = "contaminated"
_EXCERPT = 300  # maximum characters of an excerpt in tables

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
    """hits: a row per document and item, see HITS. removed: a row per contaminated document, for the item with the
    largest overlap. ignored: n-grams that more than `ignore_common` documents contain, as written in one of them, and
    the number of documents."""

    hits: pa.Table
    removed: pa.Table
    ignored: list[tuple[str, int]]


def find_contamination(
    matches: pa.Table, index: EvalIndex, max_overlap: float, ignore_common: int | None
) -> ContaminationResult:
    """Decides which documents are contaminated. matches: see MATCHES, one row per document and n-gram.

    A document is contaminated if it contains more than the share `max_overlap` of an item's n-grams. N-grams that more
    than `ignore_common` documents contain do not count.
    """
    rows = sorted(matches.to_pylist(), key=lambda row: (row["id"], row["gram"]))
    documents = Counter(row["gram"] for row in rows)
    common = {gram for gram, n in documents.items() if ignore_common is not None and n > ignore_common}
    excerpts = {row["gram"]: row["text"] for row in reversed(rows) if row["gram"] in common}
    totals = index.grams_of_items(sorted(common))
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
    hits = [_hit(own, index.items[item], int(totals[item]), max_overlap) for (_, item), own in found.items()]
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


def _hit(rows: list[dict[str, Any]], item: tuple[str, str], total: int, max_overlap: float) -> dict[str, Any]:
    overlap = len(rows) / total
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
    """The rows of the report, one per eval: items found in some document, in none, and too short to search for; and
    documents."""
    totals, rows = index.grams_of_items(), hits.to_pylist()
    report = []
    for name in dict.fromkeys(name for name, _ in index.items):
        items = [(item, int(total)) for (eval_, item), total in zip(index.items, totals, strict=True) if eval_ == name]
        own = [row for row in rows if row["eval"] == name]
        found = Counter(row["item"] for row in own)
        contaminated = Counter(row["item"] for row in own if row["contaminated"])
        short = [item for item, total in items if not total]
        report.append(
            {
                "name": name,
                "items": len(items),
                "items_found": len(found),
                "items_never_found": len(items) - len(found) - len(short),
                "items_not_looked_for": len(short),
                "documents": len({row["id"] for row in own}),
                "documents_contaminated": len({row["id"] for row in own if row["contaminated"]}),
                "found": [
                    {"item": item, "documents": n, "contaminated": contaminated[item]}
                    for item, n in found.most_common()
                ],
                "not_looked_for": short,
            }
        )
    return report
