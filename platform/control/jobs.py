"""Database access for jobs and their attempts. reconcile.py and queue.py decide their state changes.

A job is one submission of a recipe, by a user or a schedule; an attempt is one execution of it. docs/states.md shows
their states. Every change is one transaction that also adds a row to `transitions`.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from moray.platform.control.choices import LOCAL, Priority
from moray.platform.control.database import Database
from moray.platform.core.errors import InputError, MorayError, nearest
from moray.platform.core.working_folder import in_folder
from moray.platform.plan.recipe import Recipe, parse_recipe

PRIORITIES: tuple[Priority, ...] = get_args(Priority)
JobState = Literal["queued", "starting", "running", "stopping", "succeeded", "failed", "cancelled"]
AttemptState = Literal["created", "submitted", "running", "succeeded", "failed", "cancelled", "lost"]
ENDED = ("succeeded", "failed", "cancelled")
IN_FLIGHT = ("starting", "running", "stopping")
ATTEMPT_ENDED = (*ENDED, "lost")
_ALL = 1_000_000
_MOST_RETRIES = 100
_VARIABLES = 500  # of one SQL statement
_SHORTEST_PART = 3  # letters or digits of an id or a name
CHECK_SECONDS = 30.0  # timeout for checking a recipe: its files may be on a hung file system


class NotFoundError(MorayError):
    """The job, schedule or attempt does not exist."""


class ConflictError(MorayError):
    """The request is not possible in the current state."""


class Submission(BaseModel):
    """A request to run a recipe.

    source: the recipe's text. path: the file it was read from. folder: base of relative paths in the recipe. cluster:
    the name of the cluster that runs it. stored: overrides that name the submitter's files in the cluster's store.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    source: str = Field(alias="recipe", min_length=1, max_length=1 << 20)
    path: str = "recipe.yaml"
    folder: str = ""
    overrides: list[str] = Field(default_factory=list, alias="set")
    name: str = Field("", max_length=200)
    priority: Priority = "interactive"
    retries: int = Field(0, ge=0, le=_MOST_RETRIES)
    cluster: str = Field(LOCAL, max_length=63)
    stored: list[str] = Field(default_factory=list)

    def recipe(self) -> Recipe:
        """Parses and checks the recipe as `moray run` does in `folder`. Raises RecipeError, InputError for `folder`."""
        folder = Path(self.folder or "/")
        if not (folder.is_absolute() and folder.is_dir()):
            raise InputError(
                f"folder {self.folder!r} is not an absolute path to an existing folder on this machine",
                "relative paths in the recipe are resolved against it",
            )
        check = partial(parse_recipe, self.source, Path(self.path), self.overrides)
        return in_folder(folder, check, CHECK_SECONDS)


@dataclass(frozen=True)
class Attempt:
    """One row of `attempts`. `id` is also Ray's submission id and the name of the run folder."""

    id: str
    job: str
    number: int
    state: AttemptState
    detail: str
    created: float
    started: float | None
    ended: float | None


@dataclass(frozen=True)
class Job:
    """One row of `jobs`, with its attempts in order."""

    id: str
    name: str
    recipe: str
    source: str
    path: str
    folder: str
    overrides: tuple[str, ...]
    priority: Priority
    retries: int
    state: JobState
    reason: str
    stop_requested: bool
    not_before: float
    created: float
    started: float | None
    ended: float | None
    schedule: str | None
    exclusive: bool
    tick: float | None
    cluster: str = LOCAL
    stored: tuple[str, ...] = ()
    expires: float | None = None
    attempts: tuple[Attempt, ...] = field(default=())

    def attempt(self, number: int | None) -> Attempt | None:
        """Returns attempt `number`, by default the latest; None if there is none yet. Raises NotFoundError."""
        if number is None:
            return self.latest
        known = {attempt.number: attempt for attempt in self.attempts}
        if number not in known:
            raise NotFoundError(f"job {self.id} has no attempt {number}", nearest(str(number), map(str, known)))
        return known[number]

    @property
    def latest(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    def as_json(self) -> dict[str, Any]:
        """The job as documented in docs/http-api.md."""
        return {
            "id": self.id,
            "name": self.name,
            "recipe": self.recipe,
            "set": list(self.overrides),
            "priority": self.priority,
            "retries": self.retries,
            "cluster": self.cluster,
            "state": self.state,
            "reason": self.reason,
            "created": self.created,
            "started": self.started,
            "ended": self.ended,
            "schedule": self.schedule,
            "tick": self.tick,
            "attempts": [
                {name: getattr(a, name) for name in ("id", "number", "state", "created", "started", "ended", "detail")}
                for a in self.attempts
            ],
        }


class Jobs:
    """Reads and changes the tables of jobs and attempts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def submit(
        self,
        new: Submission,
        *,
        key: str | None = None,
        schedule: str | None = None,
        tick: float | None = None,
        exclusive: bool = False,
        expires: float | None = None,
    ) -> tuple[Job, bool]:
        """Queues a job. Returns (job, True), or (earlier job, False) if `key` was used before for the same submission.

        exclusive: the job waits until all earlier jobs of `schedule` have ended. expires: the job is cancelled if it
        has not started by then, seconds since the epoch. Raises RecipeError, InputError, and ConflictError if `key`
        was used for a different submission.
        """
        recipe = new.recipe()
        with self._database.write() as connection:
            known = connection.execute("SELECT id FROM jobs WHERE idempotency_key = ?", (key,)).fetchone()
            if known is not None:
                return _same(self._get(connection, known["id"]), new, str(key)), False
            now = time.time()
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
            row = {
                "id": f"{stamp}-{recipe.name}-{secrets.token_hex(3)}", "name": new.name or recipe.name,
                "recipe": recipe.name, "source": new.source, "path": new.path, "folder": new.folder,
                "overrides": json.dumps(new.overrides), "priority": new.priority, "retries": new.retries,
                "state": "queued", "created": now, "idempotency_key": key, "schedule": schedule,
                "exclusive": int(exclusive), "tick": tick,
                "cluster": new.cluster, "stored": json.dumps(new.stored), "expires": expires,
            }  # fmt: skip
            placeholders = ", ".join(f":{name}" for name in row)
            connection.execute(f"INSERT INTO jobs ({', '.join(row)}) VALUES ({placeholders})", row)
            self._database.record("job", str(row["id"]), "queued", f"by schedule {schedule}" if schedule else "")
            return self._get(connection, str(row["id"])), True

    def get(self, name: str) -> Job:
        """Returns a job by its id, its name, or a part of either that is unique. Raises NotFoundError.

        A part needs at least three letters or digits, because with a single job even `-` would be unique.
        """
        connection = self._database.read()
        if connection.execute("SELECT 1 FROM jobs WHERE id = ?", (name,)).fetchone():
            return self._get(connection, name)
        # instr instead of LIKE, because LIKE treats % and _ as wildcards.
        part = (
            "instr(id, ?) OR instr(name, ?)"
            if sum(map(str.isalnum, name)) >= _SHORTEST_PART
            else "? != '' AND name = ?"
        )
        query = f"SELECT id FROM jobs WHERE {part} ORDER BY created DESC LIMIT 4"
        found = [row["id"] for row in connection.execute(query, (name, name))]
        if len(found) == 1:
            return self._get(connection, found[0])
        if found:
            raise NotFoundError(f"{name!r} matches several jobs", f"use a longer part of: {', '.join(found)}")
        recent = [row["id"] for row in connection.execute("SELECT id FROM jobs ORDER BY created DESC LIMIT 100")]
        raise NotFoundError(f"no job {name!r}", nearest(name, recent) if recent else "no job has been submitted yet")

    def list(
        self, states: Iterable[str] = (), limit: int = 100, schedule: str | None = None, cluster: str | None = None
    ) -> Sequence[Job]:
        """Returns jobs, newest first."""
        where, values = ["1"], list[Any]()
        chosen = list(states)
        if chosen:
            where.append(f"state IN ({', '.join('?' * len(chosen))})")
            values += chosen
        if schedule is not None:
            where.append("schedule = ?")
            values.append(schedule)
        if cluster is not None:
            where.append("cluster = ?")
            values.append(cluster)
        query = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY created DESC, id DESC LIMIT ?"
        return self._select(query, *values, limit)

    def open(self, cluster: str | None = None) -> Sequence[Job]:
        """All jobs that have not ended, of one cluster or of all, oldest first."""
        return self.list([s for s in get_args(JobState) if s not in ENDED], limit=_ALL, cluster=cluster)[::-1]

    def in_flight(self, cluster: str) -> Sequence[Job]:
        """The jobs of a cluster that have an open attempt."""
        return self.list(IN_FLIGHT, limit=_ALL, cluster=cluster)

    def queue(self, limit: int) -> Sequence[Job]:
        """The first queued jobs, in the order in which they start."""
        ranks = " ".join(f"WHEN '{name}' THEN {rank}" for rank, name in enumerate(PRIORITIES))
        order = f"CASE priority {ranks} END, created, id"
        return self._select(f"SELECT * FROM jobs WHERE state = 'queued' ORDER BY {order} LIMIT ?", limit)

    def open_counts(self) -> dict[tuple[str, str], int]:
        """Number of jobs that have not ended, by (cluster, state)."""
        query = f"SELECT cluster, state, count(*) AS n FROM jobs WHERE state NOT IN {ENDED} GROUP BY cluster, state"
        return {(row["cluster"], row["state"]): int(row["n"]) for row in self._database.read().execute(query)}

    def known_attempts(self, names: Iterable[str]) -> dict[str, AttemptState]:
        """Those of these attempts that exist here, with their states."""
        wanted, found = sorted(names), dict[str, AttemptState]()
        for begin in range(0, len(wanted), _VARIABLES):
            part = wanted[begin : begin + _VARIABLES]
            query = f"SELECT id, state FROM attempts WHERE id IN ({', '.join('?' * len(part))})"
            found |= {row["id"]: row["state"] for row in self._database.read().execute(query, part)}
        return found

    def expire(self, now: float) -> Sequence[Job]:
        """Cancels the jobs that have not started by their deadline; returns them."""
        query = "SELECT id FROM jobs WHERE state = 'queued' AND started IS NULL AND expires < ?"
        late = [row["id"] for row in self._database.read().execute(query, (now,))]
        for name in late:
            with self._database.write() as connection:
                job = self._get(connection, name)
                if job.state == "queued" and not job.attempts:
                    self.move(name, "cancelled", f"missed: it did not start on cluster {job.cluster!r} by its deadline")
        return [self.get(name) for name in late]

    def counts_since(self, since: float) -> dict[str, int]:
        """Number of jobs per final state that ended at or after `since`."""
        query = "SELECT state, count(*) AS n FROM jobs WHERE ended >= ? GROUP BY state"
        found = {row["state"]: int(row["n"]) for row in self._database.read().execute(query, (since,))}
        return {state: found.get(state, 0) for state in ENDED}

    def request_stop(self, name: str) -> Job:
        """Cancels a job: at once if it is queued, otherwise after its attempt has stopped. Raises ConflictError."""
        job = self.get(name)
        with self._database.write() as connection:
            job = self._get(connection, job.id)
            if job.state in ENDED:
                raise ConflictError(f"job {job.id} has already ended ({job.state})", "there is nothing to stop")
            connection.execute("UPDATE jobs SET stop_requested = 1 WHERE id = ?", (job.id,))
            if job.state == "queued":
                self.move(job.id, "cancelled", "stopped before it started")
            elif job.state != "stopping":
                self.move(job.id, "stopping", "stop requested")
            return self._get(connection, job.id)

    def move(self, job: str, state: JobState, reason: str = "", not_before: float = 0.0) -> None:
        """Changes a job's state. Raises ConflictError if the job has ended."""
        now = time.time()
        with self._database.write() as connection:
            changed = connection.execute(
                """UPDATE jobs SET state = :state, reason = :reason, not_before = :not_before,
                   started = CASE WHEN :state = 'running' THEN coalesce(started, :now) ELSE started END,
                   ended = CASE WHEN :state IN ('succeeded', 'failed', 'cancelled') THEN :now ELSE NULL END
                   WHERE id = :id AND state NOT IN ('succeeded', 'failed', 'cancelled')""",
                {"state": state, "reason": reason, "not_before": not_before, "now": now, "id": job},
            )
            if changed.rowcount != 1:
                raise ConflictError(f"job {job} has ended and cannot change to {state}")
            self._database.record("job", job, state, reason)

    def new_attempt(self, job: str) -> Attempt:
        """Creates the next attempt of a job and moves the job to `starting`."""
        with self._database.write() as connection:
            last = connection.execute("SELECT max(number) AS n FROM attempts WHERE job = ?", (job,)).fetchone()["n"]
            number = (last or 0) + 1
            connection.execute(
                "INSERT INTO attempts (id, job, number, state, created) VALUES (?, ?, ?, 'created', ?)",
                (f"{job}.{number}", job, number, time.time()),
            )
            self._database.record("attempt", f"{job}.{number}", "created")
            self.move(job, "starting", f"attempt {number}")
            return self._get(connection, job).attempts[-1]

    def move_attempt(self, attempt: str, state: AttemptState, detail: str = "") -> None:
        """Changes an attempt's state. Raises ConflictError if the attempt has ended."""
        now = time.time()
        with self._database.write() as connection:
            changed = connection.execute(
                """UPDATE attempts SET state = :state, detail = :detail,
                   started = CASE WHEN :state = 'running' THEN coalesce(started, :now) ELSE started END,
                   ended = CASE WHEN :state IN ('succeeded', 'failed', 'cancelled', 'lost') THEN :now ELSE NULL END
                   WHERE id = :id AND state NOT IN ('succeeded', 'failed', 'cancelled', 'lost')""",
                {"state": state, "detail": detail, "now": now, "id": attempt},
            )
            if changed.rowcount != 1:
                raise ConflictError(f"attempt {attempt} has ended and cannot change to {state}")
            self._database.record("attempt", attempt, state, detail)

    def _select(self, query: str, *values: Any) -> Sequence[Job]:
        """The jobs of a query over `jobs`, with their attempts, which one further query per 500 jobs reads."""
        connection = self._database.read()
        rows = connection.execute(query, values).fetchall()
        attempts: dict[str, list[Attempt]] = {row["id"]: [] for row in rows}
        names = list(attempts)
        for begin in range(0, len(names), _VARIABLES):
            part = names[begin : begin + _VARIABLES]
            found = f"SELECT * FROM attempts WHERE job IN ({', '.join('?' * len(part))}) ORDER BY number"
            for row in connection.execute(found, part):
                attempts[row["job"]].append(Attempt(**dict(row)))
        return [_job(row, attempts[row["id"]]) for row in rows]

    def _get(self, connection: sqlite3.Connection, job: str) -> Job:
        row = connection.execute("SELECT * FROM jobs WHERE id = ?", (job,)).fetchone()
        attempts = connection.execute("SELECT * FROM attempts WHERE job = ? ORDER BY number", (job,)).fetchall()
        return _job(row, [Attempt(**dict(attempt)) for attempt in attempts])


def _job(row: sqlite3.Row, attempts: Iterable[Attempt]) -> Job:
    values = {name: row[name] for name in row.keys() if name != "idempotency_key"}  # noqa: SIM118
    values |= {
        "overrides": tuple(json.loads(row["overrides"])),
        "stored": tuple(json.loads(row["stored"])),
        "stop_requested": bool(row["stop_requested"]),
        "exclusive": bool(row["exclusive"]),
        "attempts": tuple(attempts),
    }
    return Job(**values)


def _same(job: Job, new: Submission, key: str) -> Job:
    """Returns the job submitted earlier with `key`. Raises ConflictError if that submission differs from `new`."""
    before = (job.source, job.folder, list(job.overrides), job.priority, job.retries, job.cluster, list(job.stored))
    if before != (new.source, new.folder, new.overrides, new.priority, new.retries, new.cluster, new.stored):
        raise ConflictError(f"key {key!r} was already used for a different submission, job {job.id}", "use another key")
    return job
