"""The report from the counts of shards: tokens by source, language, domain and quality band at each stage.

It also lists domains of low coverage: those with less than a given fraction of an even share, which is the tokens of
all domains divided by the number of domains. Pure functions.

Shapes: S stages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from moray.pipelines.coverage.domains import domains

KINDS = ("source", "language", "domain", "quality")
Cells = list[list[Any]]
Dropped = list[list[Any]]


def summarize(labels: Sequence[str], cells: Sequence[Cells], dropped: Sequence[Dropped], thin: float) -> dict[str, Any]:
    """The entries of `report.json` except title and tokens. cells, dropped: [S], of all shards (measure.py)."""
    stages = [
        {
            "stage": label,
            "documents": sum(cell[4] for cell in own),
            "bytes": sum(cell[5] for cell in own),
            "tokens": round(sum(cell[6] for cell in own)),
            "dropped": _by_reason(removed),
        }
        for label, own, removed in zip(labels, cells, dropped, strict=True)
    ]
    tables = {kind: _table(cells, i) for i, kind in enumerate(KINDS)}
    if all(row["name"] == "" for row in tables["quality"]):
        tables["quality"] = []
    for row in tables["quality"]:
        row["name"] = row["name"] or "not rated"
    found = {row["name"]: row for row in tables["domain"]}
    last = {name: found[name]["tokens"][-1] if name in found else 0 for name in domains()}
    even = sum(last.values()) / len(last)
    tables["domain"] += [_nothing(name, len(stages)) for name in domains() if name not in found]
    lacking = [
        {"domain": name, "tokens": tokens, "of_even_share": tokens / even if even else 0.0}
        for name, tokens in sorted(last.items(), key=lambda pair: pair[1])
        if tokens < thin * even or not even
    ]
    return {"stages": stages, **tables, "even_share": round(even), "thin_below": thin, "thin": lacking}


def _table(cells: Sequence[Cells], column: int) -> list[dict[str, Any]]:
    """A row for each name in any stage, sorted by tokens at the last stage: tokens and documents, [S] each."""
    tokens: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(cells))
    documents: dict[str, list[int]] = defaultdict(lambda: [0] * len(cells))
    for stage, own in enumerate(cells):
        for cell in own:
            tokens[cell[column]][stage] += cell[6]
            documents[cell[column]][stage] += cell[4]
    rows = [
        {"name": name, "tokens": [round(n) for n in by_stage], "documents": documents[name]}
        for name, by_stage in tokens.items()
    ]
    return sorted(rows, key=lambda row: (-row["tokens"][-1], -row["tokens"][0], row["name"]))


def _nothing(name: str, stages: int) -> dict[str, Any]:
    return {"name": name, "tokens": [0] * stages, "documents": [0] * stages}


def _by_reason(dropped: Dropped) -> list[dict[str, Any]]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for reason, documents, tokens in dropped:
        sums[reason][0] += documents
        sums[reason][1] += tokens
    rows = [{"reason": reason, "documents": int(n), "tokens": round(t)} for reason, (n, t) in sums.items()]
    return sorted(rows, key=lambda row: (-row["tokens"], -row["documents"], row["reason"]))
