"""A step over documents, its tasks one after another in this process: what it leaves, and interruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from moray.pipelines.shared.documents import document_id, read_shard, shard_name, write_shard
from moray.platform.core.home import Home
from moray.platform.store.artifacts import Artifact, ArtifactStore
from tests.step_contexts import context_for, manifest_of


class Interrupted(Exception):
    """A worker is gone."""


def in_process(monkeypatch: pytest.MonkeyPatch, module: ModuleType, stop_after: int | None = None) -> None:
    """Tasks of the module's step one after another in this process; the one after `stop_after` of them is killed."""
    done = 0

    def map_shards(ctx: Any, phase: str, rows: Any, function: Any, *_: Any, **__: Any) -> Any:
        nonlocal done
        results = []
        for row in rows:
            if done == stop_after:
                raise Interrupted
            done += 1
            results.append(function(row))
        return results

    monkeypatch.setattr(module, "map_shards", map_shards)


@dataclass(frozen=True)
class Page:
    """A document as a step gets it."""

    text: str
    key: str
    source: str = "s"
    meta: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return document_id(self.source, self.key)


@dataclass(frozen=True)
class Done:
    """tables: what the step left, by path; counts: what it counted."""

    tables: dict[str, pa.Table]
    counts: dict[str, float]

    def kept(self) -> dict[str, str]:
        """id -> text of what stays."""
        return {row["id"]: row["text"] for row in self.rows("documents-")}

    def rows(self, prefix: str) -> list[dict[str, Any]]:
        """The rows of all files whose names begin so, by id."""
        found = [row for name, table in self.tables.items() if name.startswith(prefix) for row in table.to_pylist()]
        return sorted(found, key=lambda row: str(row["id"]))


def write_pages(folder: Path, pages: Sequence[Page], shards: int) -> None:
    for number in range(shards):
        part = pages[number::shards]
        table = {
            "id": pa.array([page.id for page in part], pa.string()),
            "text": pa.array([page.text for page in part], pa.large_string()),
            "source": pa.array([page.source for page in part], pa.string()),
            "license": pa.array([""] * len(part), pa.string()),
            "meta": pa.array([list(page.meta.items()) for page in part], pa.map_(pa.string(), pa.string())),
        }
        write_shard(folder / shard_name(number), pa.table(table))


def run_in_process(
    module: ModuleType,
    config: Any,
    folder: Path,
    pages: Sequence[Page],
    shards: int,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int | None = None,
) -> Done:
    """Runs `module.step`; a second time in the same folder, it goes on. Raises Interrupted after so many tasks."""
    in_process(monkeypatch, module, stop_after)
    home = Home(folder / "home")
    work = ArtifactStore(home).prepare(module.step.name, "0" * 32, keep_leftovers=True)
    context = context_for(
        module.step.name, config, {"documents": _documents(folder / "in", pages, shards)}, work, home, home.root / "run"
    )
    module.step.run(context)
    assert context.counts["in:documents"] == len(pages)
    assert not [path.name for path in work.iterdir() if path.name.startswith(".")], "leftovers"
    tables = {str(path.relative_to(work)): read_shard(path) for path in sorted(work.rglob("*.parquet"))}
    return Done(tables, dict(context.counts))


def _documents(folder: Path, pages: Sequence[Page], shards: int) -> Artifact:
    write_pages(folder, pages, shards)
    manifest = manifest_of("filter", "1" * 32)
    return Artifact(folder, manifest)
