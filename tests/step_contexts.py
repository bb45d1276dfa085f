"""What a step is given, and what an earlier step left, without a run around them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moray.platform.core.cluster import Cluster
from moray.platform.core.events import EventLog
from moray.platform.core.home import Home
from moray.platform.plan.context import StepContext
from moray.platform.store.artifacts import Artifact
from moray.platform.store.manifest import Manifest

NOTHING: dict[str, Any] = {
    "step_version": 1, "config": {}, "address": {}, "files": [], "bytes": 0, "run": "run", "code": {},
    "environment": {}, "started": 0.0, "seconds": 0.0, "cpu_seconds": 0.0,
}  # fmt: skip


def manifest_of(step: str, fingerprint: str = "ab", produces: str = "documents", **fields: Any) -> Manifest:
    """A manifest that says nothing but this."""
    return Manifest(**{**NOTHING, "step": step, "fingerprint": fingerprint, "produces": produces, **fields})


def context_for(
    step: str,
    config: Any,
    inputs: Mapping[str, Artifact],
    folder: Path,
    home: Home,
    run: Path,
    cluster: Cluster | None = None,
) -> StepContext[Any]:
    """Without a cluster, for steps that ask for none."""
    return StepContext(
        step=step,
        config=config,
        inputs=inputs,
        folder=folder,
        home=home,
        run=run,
        events=EventLog(run / "events", "t"),
        cluster=cluster,  # type: ignore[arg-type]
        fingerprint="cd",
    )
