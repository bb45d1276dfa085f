"""Creates the deployments of models that a job has approved (`pipelines/deploy.py`).

A deployment that exists follows its alias by itself, so this only adds what is missing. A record that a user has
stopped, or that has another model, stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moray.platform.control.deploying import make_deployment
from moray.platform.control.deployment_rounds import DeploymentRounds
from moray.platform.control.deployments import Deployments, NewDeployment
from moray.platform.core.events import EventTail, StepEvent
from moray.platform.core.home import Home
from moray.platform.core.serve_options import ServeOptions
from moray.platform.store.artifacts import ArtifactStore

_STEP = "deploy"


def deploy_approved(home: Home, deployments: Deployments, serving: DeploymentRounds, run: Path) -> Iterator[str]:
    """Adds the deployments of the models that a run has approved; yields the name of each. Idempotent. Raises as
    `make_deployment`."""
    known = {one.name for one in deployments.all()}
    cluster = serving.cluster
    for approval in _approvals(ArtifactStore(Home(home.root, cluster.store) if cluster.store else home), run):
        if not approval["approved"] or approval["name"] in known:
            continue
        options = ServeOptions(**approval["options"])
        new = NewDeployment(model=approval["alias"], name=approval["name"], cluster=cluster.name, options=options)
        make_deployment(home, deployments, serving, new)
        yield approval["name"]


def _approvals(store: ArtifactStore, run: Path) -> Iterator[dict[str, Any]]:
    """The results of the run's `deploy` steps."""
    for event in EventTail(run / "events", writers="runner-*").poll():
        if not isinstance(event, StepEvent) or event.state not in ("succeeded", "reused"):
            continue
        if artifact := store.get(_STEP, event.fingerprint):
            yield json.loads((store.fetch(artifact).folder / "approval.json").read_text())
