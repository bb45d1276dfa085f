"""The history of one document: its origin, the decision of each step of a run, and the document kept in its place.

Every step that keeps or removes documents writes Parquet files with a column `id`: `documents-*` lists kept documents,
`removed*` lists removed documents with the reasons in other columns, and other files have their own names. The history
is read from these files and does not depend on the steps. Only one row group of the texts is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from moray.pipelines.shared.documents import document_id
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.run.console import visible
from moray.platform.run.history import RunRow, find_run, list_runs
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.search import local_artifact

_ID = re.compile(r"[0-9a-f]{32}")
_EXCERPT = 200  # characters
_OTHERS = ("representative", "partner")  # columns that name another document


@dataclass(frozen=True)
class RowLocation:
    """A row in a file of an artifact."""

    path: Path
    row: int

    def read(self) -> dict[str, Any]:
        """The row as a dict."""
        file = pq.ParquetFile(self.path)
        row = self.row
        for group in range(file.num_row_groups):
            if row < (size := file.metadata.row_group(group).num_rows):
                found: dict[str, Any] = file.read_row_group(group).slice(row, 1).to_pylist()[0]
                return found
            row -= size
        raise IndexError(self.row)


@dataclass(frozen=True)
class DocumentDecision:
    """The decision of a step on the document. verdict: `read`, `kept`, `removed`, or `has` (in other files)."""

    step: str
    artifact: str
    verdict: str
    file: str
    row: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """document: its source, license, meta, size and beginning. others: the same of documents named in the decisions."""

    id: str
    run: str
    document: dict[str, Any]
    decisions: list[DocumentDecision]
    others: dict[str, dict[str, Any]]


def explain_document_in(store: ArtifactStore, runs: Sequence[RunRow], name: str) -> Explanation:
    """The history of a document in the newest run that has it. name: an id, or SOURCE/KEY.

    Raises InputError if no run has the document.
    """
    wanted = _wanted(name)
    searched: set[str] = set()
    for run in runs:
        artifacts = [a for row in run.steps.values() if (a := local_artifact(store, row.fingerprint))]
        if not artifacts or artifacts[-1].reference in searched:
            continue
        searched.add(artifacts[-1].reference)
        if found := _explain(run.run, artifacts, wanted):
            return found
    runs_text = f"{len(searched)} runs with artifacts on this machine"
    raise InputError(
        f"no document {name!r} in {runs_text}",
        "give its id (32 hex digits), or SOURCE/KEY with the source's name in the recipe",
    )


def explain_in(home: Home, name: str, run: str | None = None) -> Explanation:
    """As `explain_document_in`, for all runs of a home, or for the run named `run`."""
    runs = list_runs(home) if run is None else [find_run(home, run)]
    return explain_document_in(ArtifactStore(home), runs, name)


def _wanted(name: str) -> list[str]:
    """The ids that a name may refer to."""
    source, slash, key = name.partition("/")
    return [name] if _ID.fullmatch(name) or not slash else [document_id(source, key)]


def _explain(run: str, artifacts: Sequence[Artifact], wanted: Sequence[str]) -> Explanation | None:
    decisions: list[DocumentDecision] = []
    document: dict[str, Any] = {}
    name = ""
    for artifact in artifacts:
        for place, one in _places(artifact.folder, wanted):
            name, row = one, place.read()
            if not decisions:
                document = _description(row)
            relative = str(place.path.relative_to(artifact.folder))
            verdict = _decision(relative, first=not decisions)
            details = {} if verdict in ("read", "kept") else {k: _plain(v) for k, v in row.items() if k != "id"}
            decisions.append(
                DocumentDecision(artifact.manifest.step, artifact.reference, verdict, relative, place.row, details)
            )
    if not decisions:
        return None
    named = {str(one.details[column]) for one in decisions for column in _OTHERS if one.details.get(column)}
    others = {other: _look_up(artifacts, other) for other in sorted(named - {name})}
    return Explanation(name, run, document, decisions, others)


def _look_up(artifacts: Sequence[Artifact], name: str) -> dict[str, Any]:
    """The description of another document, from the first step that has it; empty if it is from an earlier run."""
    places = (place for artifact in artifacts for place, _ in _places(artifact.folder, [name]))
    place = next(places, None)
    return _description(place.read()) if place else {}


def _places(folder: Path, wanted: Sequence[str]) -> Iterator[tuple[RowLocation, str]]:
    """The rows with one of these ids in all files."""
    paths = sorted(folder.rglob("*.parquet"))
    with ThreadPoolExecutor() as threads:
        for path, found in zip(paths, threads.map(lambda path: _rows(path, wanted), paths), strict=True):
            yield from ((RowLocation(path, row), name) for row, name in found)


def _rows(path: Path, wanted: Sequence[str]) -> list[tuple[int, str]]:
    if "id" not in pq.read_schema(path).names:
        return []
    column = pq.read_table(path, columns=["id"], memory_map=True)["id"]
    found = [(pc.index(column, name).as_py(), name) for name in wanted]
    return [(row, name) for row, name in found if row >= 0]


def _decision(relative: str, first: bool) -> str:
    name = Path(relative).name
    if name.startswith("removed"):
        return "removed"
    if name.startswith("documents-"):
        return "read" if first else "kept"
    return "has"


def _description(row: dict[str, Any]) -> dict[str, Any]:
    text = row.get("text", "")
    meta = {visible(name): visible(value or "") for name, value in row.get("meta") or []}
    return {
        "source": visible(row.get("source", "")),
        "license": visible(row.get("license", "")),
        "meta": meta,
        "bytes": len(text.encode()),
        "begins": visible(text[:_EXCERPT], "\n\t"),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    return f"{len(value)} values" if isinstance(value, list) else value
