"""Runs of the step dedup over texts, with its tasks in this process, and chains of runs with one index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moray.pipelines.dedup import phases
from moray.pipelines.dedup import step as dedup_step
from moray.pipelines.dedup.config import DedupConfig
from moray.pipelines.shared.documents import read_shard, shard_name, write_shard
from moray.platform.core.home import Home
from moray.platform.plan.fingerprint import EARLIER
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.manifest import Manifest
from tests.pipelines.dedup.oracle import Text
from tests.pipelines.step_runs import in_process
from tests.step_contexts import context_for, manifest_of

# With these bands and rows, all pairs of the default similarity are candidates.
CLOSE = DedupConfig(bands=64, rows=3, prefer=("best",))


class DedupRun:
    """One run of the step, in its own artifact store. before: the run whose index it extends."""

    def __init__(
        self,
        folder: Path,
        texts: Sequence[Text],
        shards: int,
        config: DedupConfig = CLOSE,
        before: DedupRun | None = None,
    ) -> None:
        self.texts, self.config, self.before = texts, config, before
        self.home = Home(folder / "home")
        self.store = ArtifactStore(self.home)
        self.number = before.number + 1 if before else 0
        folder = self.store.prepare("filter", _fingerprint("filter", self.number), keep_leftovers=True)
        for number in range(shards):
            write_shard(folder / shard_name(number), _table(texts[number::shards]))
        self.documents = self.store.commit(_manifest("filter", self.number, {}, {}))

    def run(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> dict[str, pa.Table]:
        """The tables that the step writes, by path. Raises Interrupted after `stop_after` tasks."""
        in_process(monkeypatch, phases, stop_after)
        folder = self.store.prepare("dedup", _fingerprint("dedup", self.number), keep_leftovers=True)
        inputs = {"documents": self.documents} | ({EARLIER: self.before.artifact} if self.before else {})
        context = context_for("dedup", self.config, inputs, folder, self.home, self.home.root / "run")
        dedup_step.step.run(context)
        assert context.counts["in:documents"] == len(self.texts)
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        references = {name: artifact.reference for name, artifact in inputs.items()}
        config = self.config.model_dump(mode="json")
        self.artifact: Artifact = self.store.commit(_manifest("dedup", self.number, config, references))
        return {str(path.relative_to(folder)): read_shard(path) for path in sorted(folder.rglob("*.parquet"))}


def run_step(
    folder: Path, texts: Sequence[Text], shards: int, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None
) -> dict[str, pa.Table]:
    """One run without an index."""
    return DedupRun(folder, texts, shards).run(monkeypatch, stop_after)


def kept(tables: dict[str, pa.Table]) -> list[str]:
    """The ids of the kept documents."""
    names = [name for name in tables if name.startswith("documents-")]
    return sorted(name for table in names for name in tables[table]["id"].to_pylist())


def removed(tables: dict[str, pa.Table]) -> pa.Table:
    """The removed documents of all shards, sorted by id."""
    return pa.concat_tables([tables[name] for name in tables if name.startswith("removed-")]).sort_by("id")


def _table(part: Sequence[Text]) -> pa.Table:
    return pa.table(
        {
            "id": pa.array([one.id for one in part], pa.string()),
            "text": pa.array([one.text for one in part], pa.large_string()),
            "source": pa.array([one.source for one in part], pa.string()),
            "license": pa.array([""] * len(part), pa.string()),
            "meta": pa.array([[]] * len(part), pa.map_(pa.string(), pa.string())),
        }
    )


def _fingerprint(step: str, number: int) -> str:
    return f"{len(step):x}{number:031x}"


def _manifest(step: str, number: int, config: dict[str, Any], inputs: dict[str, str]) -> Manifest:
    return manifest_of(step, _fingerprint(step, number), config=config, inputs=inputs)
