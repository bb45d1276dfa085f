"""Logs runs and metrics and registers models in MLflow: a SQLite file under MORAY_HOME with one writer at a time.

Only the process that runs a recipe writes, in batches, never a training worker. A file lock serializes runs on one
machine. MLflow reserves the alias `latest`, so the newest version has the alias `newest`.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moray.platform.core.events import MetricEvent
from moray.platform.core.home import Home
from moray.platform.store.aliases import NEWEST

EXPERIMENT = "moray"
_BATCH = 1000  # MLflow's limit of metrics per request


@dataclass(frozen=True)
class Registered:
    """A registered model version."""

    name: str
    version: int
    run_id: str


def database_uri(home: Home) -> str:
    """SQLAlchemy URI of MLflow's database, quoted because a path may contain `#`, `?` and `%`. The URI names the
    driver; without it MLflow would also create a folder at the quoted path."""
    return f"sqlite+pysqlite:///{quote(str(home.mlflow_db))}"


def register_model(
    home: Home,
    name: str,
    source: Path,
    curves: Iterable[MetricEvent],
    values: Mapping[str, float],
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> Registered:
    """Logs a run with its curves and final values; registers `source` as the version `newest` of `name`."""
    with _client(home) as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(EXPERIMENT, artifact_location=home.mlflow_artifacts.as_uri())
        )
        run = client.create_run(experiment_id, run_name=tags.get("moray.run", name), tags=dict(tags))
        run_id = run.info.run_id
        _log(client, run_id, curves, values, params)
        client.set_terminated(run_id)
        if not list(client.search_registered_models(f"name = '{name}'")):
            client.create_registered_model(name)
        version = client.create_model_version(name, source.as_uri(), run_id, tags=dict(tags))
        client.set_registered_model_alias(name, NEWEST, version.version)
        return Registered(name, int(version.version), run_id)


def _log(
    client: Any,
    run_id: str,
    curves: Iterable[MetricEvent],
    values: Mapping[str, float],
    params: Mapping[str, Any],
) -> None:
    from mlflow.entities import Metric, Param

    rows = [Metric(_key(event), event.value, int(event.time * 1000), event.at) for event in curves]
    rows += [Metric(name, value, 0, 0) for name, value in values.items()]
    for start in range(0, len(rows), _BATCH):
        client.log_batch(run_id, metrics=rows[start : start + _BATCH])
    client.log_batch(run_id, params=[Param(key, str(value)[:500]) for key, value in params.items()])


def _key(event: MetricEvent) -> str:
    return "/".join([f"moray_{event.name}", *(value for _, value in sorted(event.labels.items()))])


@contextlib.contextmanager
def _client(home: Home) -> Iterator[Any]:
    """Yields an MlflowClient on the SQLite store, holding the file lock."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # after the import, which sets levels of its own
        logging.getLogger(name).setLevel(logging.WARNING)
    with home.mlflow_db.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        uri = database_uri(home)
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)
