"""Database access for deployments and their versions. deployment_rules.py decides their state changes.

A deployment is a name under which a cluster serves a model for as long as the record says so. A version is a model with
options: a deployment gets a new one when its alias names another model, or when it is deployed with other options.
docs/deployments.md has the states. Every change is one transaction that also adds a row to `transitions`.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moray.platform.control.choices import LOCAL
from moray.platform.control.database import Database
from moray.platform.control.jobs import ConflictError, NotFoundError
from moray.platform.core.errors import InputError, nearest
from moray.platform.core.serve_options import ServeOptions
from moray.platform.core.serving import ServedModel, checked_deployment_name

PORT = 8000
DRAIN_SECONDS = 120.0  # for open requests when a replica stops; Serve waits as long for one that was never placed
_SHOWN = 30  # latest versions in JSON; a nightly recipe makes hundreds
STARTS = 3  # failed starts of replicas before a version counts as failed
DeploymentState = Literal["pending", "starting", "running", "rolling", "failed", "stopping", "stopped"]
VersionState = Literal["starting", "live", "replaced", "failed"]
_OPEN = "(wanted = 'running' OR state != 'stopped')"  # of a deployment that a cluster has something to do for


class NewDeployment(BaseModel):
    """A request to serve a model.

    model: an alias such as quickstart@newest, which the deployment follows; or an artifact; or, on the local cluster, a
    folder. name: by default the alias' name. port: of the cluster's ingress, the same for all of its deployments; by
    default that of the others, or 8000.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f]+$")
    name: str = Field("", max_length=63)
    cluster: str = Field(LOCAL, max_length=63)
    port: int | None = Field(None, ge=1, le=65535, strict=True)
    options: ServeOptions = ServeOptions()


@dataclass(frozen=True)
class Version:
    """One row of `versions`. reference: step/fingerprint of its artifact, or the path of its folder."""

    number: int
    reference: str
    model: ServedModel
    state: VersionState
    reason: str
    created: float
    since: float

    def as_json(self) -> dict[str, Any]:
        options = asdict(self.model.options)
        row = {
            "version": self.number, "reference": self.reference, "folder": self.model.folder, "state": self.state,
            "reason": self.reason, "created": self.created, "since": self.since, "options": options,
            "resources": self.model.resources,
        }  # fmt: skip
        return row


@dataclass(frozen=True)
class Deployment:
    """One row of `deployments`, with its versions in order."""

    name: str
    cluster: str
    model: str
    port: int
    replicas: int
    most_replicas: int
    target_tokens: int
    wanted: Literal["running", "stopped"]
    state: DeploymentState
    reason: str
    created: float
    changed: float
    versions: tuple[Version, ...] = ()

    @property
    def live(self) -> Version | None:
        """The version that answers, or that answered last."""
        return next((one for one in reversed(self.versions) if one.state == "live"), None)

    @property
    def starting(self) -> Version | None:
        """The version that is to become live."""
        return next((one for one in reversed(self.versions) if one.state == "starting"), None)

    @property
    def desired(self) -> Version | None:
        """The version that Serve is to run."""
        return self.starting or self.live

    @property
    def previous(self) -> Version | None:
        """The version for a rollback: during a rollover the live one, else the one before. That is, of those that were
        live, the one with the highest number below that of the current one."""
        if self.starting and self.live:
            return self.live
        current = self.desired
        was_live = [v for v in self.versions if v.state == "replaced" and not v.reason]
        below = [v for v in was_live if not current or v.number < current.number]
        return below[-1] if below else None

    @property
    def goes_back(self) -> bool:
        """Whether a rollback is under way: the version that is to become live is older than the live one."""
        return bool(self.starting and self.live and self.starting.number < self.live.number)

    @property
    def follows(self) -> bool:
        """Whether a new model under its alias becomes a new version."""
        return "@" in self.model

    def as_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in _COLUMNS}
        found["live"] = self.live.number if self.live else None
        found["previous"] = self.previous.number if self.previous else None
        found["versions"] = [one.as_json() for one in self.versions[-_SHOWN:]]
        return found


_COLUMNS = (
    "name", "cluster", "model", "port", "replicas", "most_replicas", "target_tokens", "wanted", "state", "reason",
    "created", "changed",
)  # fmt: skip


class Deployments:
    """Reads and changes the tables of deployments and versions."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self.clock = clock

    def deploy(self, new: NewDeployment, reference: str, folder: str, gpus: int, events: str = "") -> Deployment:
        """Records that a model is to be served. Deploying the same again changes nothing but the number of replicas.

        reference, folder: of the model that `new.model` names now. gpus: of the cluster. events: the folder below which
        replicas report. Raises InputError for a name or options that cannot be, ConflictError for a name on another
        cluster or another port.
        """
        name = checked_deployment_name(new.name or _default_name(new.model))
        options = new.options
        model = ServedModel(
            folder=folder, name=name, reference=reference, options=options, resources=options.resources(gpus),
            drain_seconds=DRAIN_SECONDS, starts=STARTS, events=f"{events}/{name}" if events else "",
        )  # fmt: skip
        with self._database.write() as connection:
            self._check_place(connection, name, new)
            port = new.port or self._port(connection, new.cluster)
            now = self.clock()
            connection.execute(
                "INSERT INTO deployments (name, cluster, model, port, replicas, most_replicas, target_tokens, wanted, "
                "state, created, changed) VALUES (?, ?, ?, ?, ?, ?, ?, 'running', 'pending', ?, ?) ON CONFLICT (name) "
                "DO UPDATE SET model = excluded.model, port = excluded.port, replicas = excluded.replicas, "
                "most_replicas = excluded.most_replicas, target_tokens = excluded.target_tokens, wanted = 'running'",
                (
                    name,
                    new.cluster,
                    new.model,
                    port,
                    options.replicas,
                    options.most_replicas,
                    options.target_tokens,
                    now,
                    now,
                ),
            )
            before = self._get(connection, name)
            if before.wanted == "running" and before.state in ("stopping", "stopped"):
                self.move(name, "pending")
            if not _same(before.desired, reference, model):
                self.add_version(name, reference, model)
            return self._get(connection, name)

    def add_version(self, name: str, reference: str, model: ServedModel) -> None:
        """Adds the version that is to become live. One that is still starting is replaced."""
        with self._database.write() as connection:
            known = self._get(connection, name)
            number = 1 + max((one.number for one in known.versions), default=0)
            if known.starting:
                self.move_version(name, known.starting.number, "replaced", f"by version {number}, at its start")
            now = self.clock()
            numbered = model.model_copy(update={"version": str(number)})
            connection.execute(
                "INSERT INTO versions (deployment, number, reference, arguments, state, created, since) "
                "VALUES (?, ?, ?, ?, 'starting', ?, ?)",
                (name, number, reference, numbered.model_dump_json(), now, now),
            )
            self._database.record("version", f"{name}.{number}", "starting", reference)

    def all(self, cluster: str | None = None, only_open: bool = False) -> Sequence[Deployment]:
        """All deployments, or those of a cluster, by name. only_open: without those that have stopped."""
        connection = self._database.read()
        query = f"SELECT * FROM deployments WHERE ?1 IN ('', cluster) AND {_OPEN if only_open else 1} ORDER BY name"
        return [self._whole(connection, row) for row in connection.execute(query, (cluster or "",)).fetchall()]

    def clusters(self) -> set[str]:
        """The clusters that have something to do for a deployment."""
        rows = self._database.read().execute(f"SELECT DISTINCT cluster FROM deployments WHERE {_OPEN}")
        return {row["cluster"] for row in rows.fetchall()}

    def get(self, name: str) -> Deployment:
        """Raises NotFoundError with the nearest name."""
        return self._get(self._database.read(), name)

    def stop(self, name: str) -> Deployment:
        """Records that a deployment is to end; its open requests are finished first."""
        with self._database.write() as connection:
            known = self._get(connection, name)
            if known.wanted == "running":
                connection.execute("UPDATE deployments SET wanted = 'stopped' WHERE name = ?", (name,))
                if known.starting:
                    self.move_version(name, known.starting.number, "replaced", "stopped by a user, at its start")
                self.move(name, "stopping", "stopped by a user")
            return self._get(connection, name)

    def end(self, name: str) -> bool:
        """Records that a deployment has stopped. Returns False if a user has deployed or removed it meanwhile."""
        with self._database.write() as connection:
            query = "SELECT 1 FROM deployments WHERE name = ? AND wanted = 'stopped'"
            if connection.execute(query, (name,)).fetchone() is None:
                return False
            self.move(name, "stopped", "stopped by a user")
            return True

    def remove(self, name: str, lost: bool = False) -> None:
        """Deletes the record of a stopped deployment; of any deployment if its cluster is `lost`. Raises ConflictError
        if it is not stopped."""
        with self._database.write() as connection:
            known = self._get(connection, name)
            if known.state != "stopped" and not lost:
                stopping = known.wanted == "stopped"
                hint = "wait until it has stopped" if stopping else f"stop it first: moray deployments stop {name}"
                raise ConflictError(f"deployment {name!r} is {known.state}", hint)
            connection.execute("DELETE FROM deployments WHERE name = ?", (name,))
            self._database.record("deployment", name, "removed")

    def rollback(self, name: str, to: int | None = None) -> Deployment:
        """Makes an earlier version the one to serve, by default the last one before. Its alias is followed again as
        soon as it names another model. Raises ConflictError if there is no such version."""
        with self._database.write() as connection:
            known = self._get(connection, name)
            if known.wanted == "stopped":
                raise ConflictError(f"deployment {name!r} is stopped", f"start it: moray deploy {known.model}")
            target = known.previous if to is None else next((v for v in known.versions if v.number == to), None)
            if target is None:
                problem = "has no earlier version" if to is None else f"has no version {to}"
                raise ConflictError(f"deployment {name!r} {problem}", f"moray deployments history {name}")
            if target == known.desired:
                raise ConflictError(f"version {target.number} of {name!r} is the current one", "name another")
            self.return_to(known, target, "rolled back by a user")
            return self._get(connection, name)

    def return_to(self, deployment: Deployment, target: Version, reason: str) -> None:
        """Makes an earlier version the one that is to become live. The live version serves on until then, with the
        reason why it will have failed. If the target is the live one, a version that starts has failed instead."""
        with self._database.write():
            if starting := deployment.starting:
                ended: VersionState = "replaced" if deployment.goes_back else "failed"
                self.move_version(deployment.name, starting.number, ended, "" if deployment.goes_back else reason)
            if target.state == "live":
                self.move_version(deployment.name, target.number, "live")
                return
            if deployment.live:
                self.move_version(deployment.name, deployment.live.number, "live", reason)
            self.move_version(deployment.name, target.number, "starting")

    def move(self, name: str, state: DeploymentState, reason: str = "") -> None:
        """Changes the state of a deployment. No-op if it has this state for this reason already."""
        with self._database.write() as connection:
            known = self._get(connection, name)
            if (known.state, known.reason) == (state, reason):
                return
            connection.execute(
                "UPDATE deployments SET state = ?, reason = ?, changed = ? WHERE name = ?",
                (state, reason, self.clock() if state != known.state else known.changed, name),
            )
            if state != known.state:
                self._database.record("deployment", name, state, reason)

    def explain(self, name: str, reason: str) -> None:
        """Sets the reason for the state of a deployment that is to run."""
        with self._database.write() as connection:
            query = "UPDATE deployments SET reason = ? WHERE name = ? AND wanted = 'running'"
            connection.execute(query, (reason, name))

    def move_version(self, name: str, number: int, state: VersionState, reason: str = "") -> None:
        """Changes the state of a version, or the reason for its state."""
        with self._database.write() as connection:
            connection.execute(
                "UPDATE versions SET since = CASE state WHEN ?1 THEN since ELSE ?3 END, state = ?1, reason = ?2 "
                "WHERE deployment = ?4 AND number = ?5",
                (state, reason, self.clock(), name, number),
            )
            self._database.record("version", f"{name}.{number}", state, reason)

    def history(self, name: str) -> list[dict[str, Any]]:
        """What happened to a deployment and its versions, in order. An earlier deployment of this name is another."""
        self.get(name)
        query = (
            "SELECT time, kind, id, state, why FROM transitions WHERE sequence > coalesce((SELECT max(sequence) FROM "
            "transitions WHERE kind = 'deployment' AND id = ?1 AND state = 'removed'), 0) AND "
            "(kind = 'deployment' AND id = ?1 OR kind = 'version' AND id GLOB ?2) ORDER BY sequence"
        )
        rows = self._database.read().execute(query, (name, f"{name}.[0-9]*")).fetchall()
        return [
            {
                "time": row["time"],
                "version": int(row["id"].rpartition(".")[2]) if row["kind"] == "version" else None,
                "state": row["state"],
                "reason": row["why"],
            }
            for row in rows
        ]

    @contextmanager
    def unless_changed(self, deployment: Deployment) -> Iterator[bool]:
        """A transaction around decisions on a deployment; yields whether it still is as it was when they were made."""
        with self._database.write() as connection:
            row = connection.execute("SELECT * FROM deployments WHERE name = ?", (deployment.name,)).fetchone()
            yield row is not None and self._whole(connection, row) == deployment

    def _check_place(self, connection: sqlite3.Connection, name: str, new: NewDeployment) -> None:
        """Raises ConflictError if the name is on another cluster, or if other deployments have another port."""
        row = connection.execute("SELECT cluster FROM deployments WHERE name = ?", (name,)).fetchone()
        if row is not None and row["cluster"] != new.cluster:
            raise ConflictError(
                f"deployment {name!r} is on cluster {row['cluster']!r}",
                f"choose another --name, or remove it: moray deployments rm {name}",
            )
        if new.port is None:
            return
        query = "SELECT name, port FROM deployments WHERE cluster = ? AND name != ? AND state != 'stopped'"
        for other in connection.execute(query, (new.cluster, name)).fetchall():
            if other["port"] != new.port:
                raise ConflictError(
                    f"the deployments of cluster {new.cluster!r} are served at port {other['port']}",
                    f"leave --port out, or stop {other['name']!r} first",
                )

    def _port(self, connection: sqlite3.Connection, cluster: str) -> int:
        query = "SELECT port FROM deployments WHERE cluster = ? ORDER BY state = 'stopped', changed DESC LIMIT 1"
        row = connection.execute(query, (cluster,)).fetchone()
        return int(row["port"]) if row else PORT

    def _get(self, connection: sqlite3.Connection, name: str) -> Deployment:
        row = connection.execute("SELECT * FROM deployments WHERE name = ?", (name,)).fetchone()
        if row is None:
            names = [row["name"] for row in connection.execute("SELECT name FROM deployments").fetchall()]
            raise NotFoundError(f"unknown deployment {name!r:.80}", nearest(name, names) or "moray deployments list")
        return self._whole(connection, row)

    def _whole(self, connection: sqlite3.Connection, row: sqlite3.Row) -> Deployment:
        query = "SELECT * FROM versions WHERE deployment = ? ORDER BY number"
        versions = tuple(
            Version(
                number=one["number"],
                reference=one["reference"],
                model=ServedModel.model_validate_json(one["arguments"]),
                state=one["state"],
                reason=one["reason"],
                created=one["created"],
                since=one["since"],
            )
            for one in connection.execute(query, (row["name"],)).fetchall()
        )
        return Deployment(**dict(row), versions=versions)


def _default_name(model: str) -> str:
    """The name of an alias, or of a folder. Raises InputError for an artifact."""
    if "@" not in model and not model.startswith("/"):
        raise InputError(f"a deployment of {model} needs a name", "give it with --name")
    path = model.partition("@")[0] if "@" in model else model.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^a-z0-9_-]+", "-", path.lower()).strip("-_")


def _same(version: Version | None, reference: str, model: ServedModel) -> bool:
    """Whether a version is this model with these options, whatever the number of replicas."""
    if version is None or version.reference != reference:
        return False
    return _identity(version.model) == _identity(model)


def _identity(model: ServedModel) -> str:
    fields = model.model_dump(mode="json")
    for name in ("replicas", "most_replicas", "target_tokens"):
        del fields["options"][name]
    return json.dumps({name: value for name, value in fields.items() if name != "version"}, sort_keys=True)
