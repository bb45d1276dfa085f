"""What became of one document: where it came from, what each step of a run decided, and which document stays for it.

Every step that keeps or removes documents leaves Parquet files with a column `id`: `documents-*` of what it keeps,
`removed*` of what it does not, with its reasons in the other columns, and others by their own names. So this asks the
files, not the steps; of the texts, one row group is read.
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
    """A row of a file of an artifact."""

    path: Path
    row: int

    def read(self) -> dict[str, Any]:
        """The row; a list of numbers in it counts as how many."""
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
    """What a step did with the document: `read` it, `kept` it, `removed` it, or `has` it in a form of its own."""

    step: str
    artifact: str
    verdict: str
    file: str
    row: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Explanation:
    """document: its source, license, meta, size and beginning. others: of documents that the decisions name."""

    id: str
    run: str
    document: dict[str, Any]
    decisions: list[DocumentDecision]
    others: dict[str, dict[str, Any]]


def explain_document_in(store: ArtifactStore, runs: Sequence[RunRow], name: str) -> Explanation:
    """By the newest of the runs that knows it. name: an id, or SOURCE/KEY. Raises InputError if none does."""
    wanted = _wanted(name)
    asked: set[str] = set()
    for run in runs:
        artifacts = [a for row in run.steps.values() if (a := local_artifact(store, row.fingerprint))]
        if not artifacts or artifacts[-1].reference in asked:
            continue
        asked.add(artifacts[-1].reference)
        if found := _explain(run.run, artifacts, wanted):
            return found
    here = f"{len(asked)} runs whose artifacts are on this machine"
    raise InputError(
        f"no document {name!r} in {here}", "give its id (32 hex digits), or SOURCE/KEY as the recipe names it"
    )


def explain_in(home: Home, name: str, run: str | None = None) -> Explanation:
    """As `explain_document_in`, by the runs of a home, or by one of them."""
    runs = list_runs(home) if run is None else [find_run(home, run)]
    return explain_document_in(ArtifactStore(home), runs, name)


def _wanted(name: str) -> list[str]:
    """The ids that a name may stand for."""
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
            verdict = _verdict(relative, first=not decisions)
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
    """What is known of another document, from the first step that has it; nothing if it is of an earlier run."""
    places = (place for artifact in artifacts for place, _ in _places(artifact.folder, [name]))
    place = next(places, None)
    return _description(place.read()) if place else {}


def _places(folder: Path, wanted: Sequence[str]) -> Iterator[tuple[RowLocation, str]]:
    """The rows of all files with one of these ids."""
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


def _verdict(relative: str, first: bool) -> str:
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
