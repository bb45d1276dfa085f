"""Database access for schedules and ticks. `ticks.decide_ticks` decides; this module applies its decisions.

A tick is one transaction that writes its row, its job and the schedule's cursor. docs/schedules.md has the rules.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from moray.platform.control.choices import Catchup, Overlap, Priority
from moray.platform.control.database import Database
from moray.platform.control.jobs import ConflictError, Jobs, NotFoundError, Submission
from moray.platform.control.ticks import (
    Cron,
    Every,
    ScheduleState,
    TickDecision,
    Trigger,
    decide_ticks,
    format_every,
    parse_every,
    parse_trigger,
)
from moray.platform.core.errors import InputError, MorayError, nearest

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_SHOWN = 50  # latest ticks returned with a schedule
_MOST_NEXT = 100
_STEPS = 4  # decisions per schedule in one call of `tick`: a batch of missed ticks, the newest, two due ones


class NewSchedule(Submission):
    """A request for a schedule: a submission repeated at every tick. Its jobs have the schedule's `name`.

    deadline: a duration such as 2h. A job that has not started that long after its tick is cancelled, as missed.
    """

    name: str
    priority: Priority = "batch"  # no user waits for it at a terminal
    cron: str | None = Field(None, max_length=500)
    every: str | None = Field(None, max_length=100)
    tz: str = Field("UTC", max_length=100)
    overlap: Overlap = "skip"
    catchup: Catchup = "none"
    deadline: str | None = Field(None, max_length=100)


@dataclass(frozen=True)
class Tick:
    """One row of `ticks`: `count` ticks from `tick` to `until` with one outcome."""

    tick: float
    until: float
    count: int
    outcome: str
    job: str | None
    reason: str


@dataclass(frozen=True)
class Schedule:
    """One row of `schedules`, with its latest ticks, newest first."""

    name: str
    recipe: str
    submission: Submission
    trigger: Trigger
    tz: str
    overlap: Overlap
    catchup: Catchup
    deadline: float | None  # seconds
    paused: bool
    created: float
    cursor: float
    ticks: tuple[Tick, ...] = ()

    def next(self, now: float) -> float | None:
        """The next tick; None while the schedule is paused or if the tick cannot be computed."""
        with contextlib.suppress(InputError):
            return None if self.paused else self.trigger.after(max(now, self.cursor))
        return None


class Schedules:
    """Reads and changes the tables of schedules and ticks. `clock` gives the time of changes by a user."""

    def __init__(self, database: Database, jobs: Jobs, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._jobs = jobs
        self.clock = clock

    def add(self, new: NewSchedule) -> Schedule:
        """Adds a schedule. Raises RecipeError or InputError for invalid fields, ConflictError if the name is taken."""
        if not _NAME.fullmatch(new.name):
            hint = "use a lower-case letter, then up to 62 lower-case letters, digits, - and _"
            raise InputError(f"invalid schedule name {new.name!r:.80}", hint)
        now = self.clock()
        parse_trigger(new.cron, new.every, new.tz, now)
        row = {
            "name": new.name, "recipe": new.recipe().name, "source": new.source, "path": new.path,
            "folder": new.folder, "overrides": json.dumps(new.overrides), "priority": new.priority,
            "retries": new.retries, "cron": " ".join(new.cron.split()) if new.cron is not None else None,
            "every": parse_every(new.every) if new.every is not None else None, "tz": new.tz,
            "overlap": new.overlap, "catchup": new.catchup, "created": now, "cursor": now, "cluster": new.cluster,
            "stored": json.dumps(new.stored),
            "deadline": parse_every(new.deadline) if new.deadline is not None else None,
        }  # fmt: skip
        placeholders = ", ".join(f":{name}" for name in row)
        with self._database.write() as connection:
            if connection.execute("SELECT 1 FROM schedules WHERE name = ?", (new.name,)).fetchone():
                hint = f"use another name, or remove the schedule: moray schedule rm {new.name}"
                raise ConflictError(f"schedule {new.name!r} already exists", hint)
            connection.execute(f"INSERT INTO schedules ({', '.join(row)}) VALUES ({placeholders})", row)
            self._database.record("schedule", new.name, "added")
            return _load(connection, _row(connection, new.name))

    def get(self, name: str) -> Schedule:
        """Returns one schedule with its latest ticks. Raises NotFoundError."""
        connection = self._database.read()
        return _load(connection, _row(connection, name), _SHOWN)

    def list(self) -> list[Schedule]:
        """Returns all schedules, sorted by name, each with its latest tick."""
        connection = self._database.read()
        rows = connection.execute("SELECT * FROM schedules ORDER BY name").fetchall()
        return [_load(connection, row, 1) for row in rows]

    def as_json(self, schedule: Schedule) -> dict[str, Any]:
        """The schedule as documented in docs/http-api.md."""
        submission, trigger = schedule.submission, schedule.trigger
        return {
            "name": schedule.name,
            "recipe": schedule.recipe,
            "set": list(submission.overrides),
            "cron": trigger.text if isinstance(trigger, Cron) else None,
            "every": format_every(trigger.seconds) if isinstance(trigger, Every) else None,
            "tz": schedule.tz,
            "english": trigger.english(),
            "overlap": schedule.overlap,
            "catchup": schedule.catchup,
            "priority": submission.priority,
            "retries": submission.retries,
            "cluster": submission.cluster,
            "deadline": format_every(int(schedule.deadline)) if schedule.deadline is not None else None,
            "paused": schedule.paused,
            "created": schedule.created,
            "next": schedule.next(self.clock()),
            "ticks": [asdict(tick) for tick in schedule.ticks],
        }

    def next(self, name: str, count: int = 5) -> Sequence[float]:
        """The next ticks of a schedule, as if it were not paused. Raises NotFoundError, InputError."""
        if not 1 <= count <= _MOST_NEXT:
            raise InputError(f"n must be between 1 and {_MOST_NEXT}, got {count}", "for example 5")
        schedule = self.get(name)
        found = [schedule.trigger.after(max(self.clock(), schedule.cursor))]
        while len(found) < count:
            found.append(schedule.trigger.after(found[-1]))
        return found

    def pause(self, name: str) -> Schedule:
        """Pauses a schedule: all ticks from now on are skipped. Raises NotFoundError, ConflictError."""
        self._settle(name)
        return self._set_paused(name, True)

    def resume(self, name: str) -> Schedule:
        """Resumes a schedule; ticks during the pause stay skipped. Raises NotFoundError, ConflictError."""
        self._settle(name)  # raises InputError if the trigger cannot be computed, so the schedule stays paused
        return self._set_paused(name, False)

    def remove(self, name: str) -> None:
        """Deletes a schedule but keeps its jobs and ticks. Raises NotFoundError."""
        with contextlib.suppress(InputError):
            self._settle(name, "removed")
        with self._database.write() as connection:
            _row(connection, name)
            connection.execute("DELETE FROM schedules WHERE name = ?", (name,))
            self._database.record("schedule", name, "removed")

    def tick(self, now: float) -> None:
        """Decides the ticks due by `now`. After long downtime it decides a part of them; the next call continues."""
        for row in self._database.read().execute("SELECT * FROM schedules ORDER BY name").fetchall():
            try:
                for _ in range(_STEPS if _trigger(row).after(row["cursor"]) <= now else 0):
                    self._step(row["name"], now)
            except InputError as error:
                self._pause_broken(row["name"], error.message)

    def next_wake(self, now: float) -> float:
        """Time of the next due tick: `now` if one is already due, infinity if nothing is scheduled."""
        due = math.inf
        for row in self._database.read().execute("SELECT * FROM schedules WHERE NOT paused").fetchall():
            try:
                due = min(due, _trigger(row).after(row["cursor"]))
            except InputError:
                return now  # `tick` pauses it
        return max(now, due)

    def _settle(self, name: str, held: str = "") -> None:
        """Decides all ticks before now. Raises NotFoundError, InputError."""
        self.get(name)
        now = self.clock()
        while self._step(name, now, held):
            pass

    def _step(self, name: str, now: float, held: str = "") -> bool:
        """Decides the oldest due ticks in one transaction; False if there are none."""
        schedule, decision = _decide(self._database.read(), name, now, held)
        if schedule is None or decision is None:
            return False
        # Checked before the transaction, because checking a recipe may import its steps and would block every writer.
        problem = _problem(schedule.submission) if decision.run else decision.reason
        with self._database.write() as connection:
            if _decide(connection, name, now, held) != (schedule, decision):
                return True  # another thread changed the schedule; decide again
            job, reason = (None, problem) if problem else self._submit(schedule, decision)
            self._write(connection, schedule, decision, job, reason, now)
        return True

    def _submit(self, schedule: Schedule, decision: TickDecision) -> tuple[str | None, str]:
        """Submits the job of a tick; returns (job id, "") or (None, reason)."""
        key = f"schedule:{schedule.name}:{schedule.created}:{decision.tick}"
        try:
            job, _ = self._jobs.submit(
                schedule.submission,
                key=key,
                schedule=schedule.name,
                tick=decision.tick,
                exclusive=decision.exclusive,
                expires=None if schedule.deadline is None else decision.tick + schedule.deadline,
            )
        except MorayError as error:  # the recipe became invalid just now; nothing has been written yet
            return None, error.message
        return job.id, ""

    def _write(
        self,
        connection: sqlite3.Connection,
        schedule: Schedule,
        decision: TickDecision,
        job: str | None,
        reason: str,
        now: float,
    ) -> None:
        values = {
            "schedule": schedule.name, "created": schedule.created, "tick": decision.tick, "until": decision.until,
            "count": decision.count, "outcome": "run" if job else "skipped", "job": job, "reason": reason,
            "decided": now,
        }  # fmt: skip
        joined = 0
        if job is None:  # ticks are decided in order, so the newest row directly precedes this tick
            joined = connection.execute(
                """UPDATE ticks SET until = :until, count = count + :count, decided = :decided
                   WHERE schedule = :schedule AND created = :created AND outcome = 'skipped' AND reason = :reason
                   AND tick = (SELECT max(tick) FROM ticks WHERE schedule = :schedule AND created = :created)""",
                values,
            ).rowcount
        if not joined:
            placeholders = ", ".join(f":{name}" for name in values)
            connection.execute(f"INSERT INTO ticks ({', '.join(values)}) VALUES ({placeholders})", values)
            outcome = str(values["outcome"])
            self._database.record("tick", f"{schedule.name}@{decision.tick:.0f}", outcome, job or reason)
        connection.execute("UPDATE schedules SET cursor = ? WHERE name = ?", (decision.until, schedule.name))

    def _set_paused(self, name: str, paused: bool) -> Schedule:
        with self._database.write() as connection:
            if bool(_row(connection, name)["paused"]) == paused:
                state = "already paused" if paused else "not paused"
                raise ConflictError(f"schedule {name!r} is {state}", "there is nothing to do")
            connection.execute("UPDATE schedules SET paused = ? WHERE name = ?", (int(paused), name))
            self._database.record("schedule", name, "paused" if paused else "resumed")
            return _load(connection, _row(connection, name), 1)

    def _pause_broken(self, name: str, reason: str) -> None:
        """Pauses a schedule whose trigger cannot be computed."""
        with self._database.write() as connection:
            changed = connection.execute("UPDATE schedules SET paused = 1 WHERE name = ? AND NOT paused", (name,))
            if changed.rowcount:
                self._database.record("schedule", name, "paused", reason)


def _decide(
    connection: sqlite3.Connection, name: str, now: float, held: str
) -> tuple[Schedule | None, TickDecision | None]:
    """Loads a schedule and decides its oldest due ticks; (None, None) if the schedule was removed."""
    row = connection.execute("SELECT * FROM schedules WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None, None
    schedule = _load(connection, row)
    busy = connection.execute(
        """SELECT id FROM jobs WHERE schedule = ? AND state NOT IN ('succeeded', 'failed', 'cancelled')
           ORDER BY created, id LIMIT 1""",
        (name,),
    ).fetchone()
    held = held or ("paused" if schedule.paused else "")
    state = ScheduleState(
        schedule.trigger, schedule.cursor, held, schedule.overlap, schedule.catchup, busy["id"] if busy else ""
    )
    return schedule, decide_ticks(state, now)


def _problem(submission: Submission) -> str:
    """The reason why a submission is no longer valid; empty if it is valid."""
    try:
        submission.recipe()
    except MorayError as error:
        return error.message
    except Exception as error:  # raised by a third-party step; it must not stop other schedules
        return f"{type(error).__name__}: {error}"
    return ""


def _names(connection: sqlite3.Connection) -> list[str]:
    return [row["name"] for row in connection.execute("SELECT name FROM schedules ORDER BY name")]


def _row(connection: sqlite3.Connection, name: str) -> sqlite3.Row:
    """Returns the row of a schedule. Raises NotFoundError."""
    found: sqlite3.Row | None = connection.execute("SELECT * FROM schedules WHERE name = ?", (name,)).fetchone()
    if found is None:
        known = _names(connection)
        hint = nearest(name, known) if known else "there are no schedules; add one: moray schedule add"
        raise NotFoundError(f"no schedule {name!r:.80}", hint)
    return found


def _trigger(row: sqlite3.Row) -> Trigger:
    if row["cron"] is not None:
        return Cron(row["cron"], row["tz"])
    return Every(int(row["every"]), math.floor(row["created"]))


def _load(connection: sqlite3.Connection, row: sqlite3.Row, ticks: int = 0) -> Schedule:
    latest = connection.execute(
        """SELECT tick, until, count, outcome, job, reason FROM ticks WHERE schedule = ? AND created = ?
           ORDER BY tick DESC LIMIT ?""",
        (row["name"], row["created"], ticks),
    )
    submission = Submission(
        source=row["source"],
        path=row["path"],
        folder=row["folder"],
        overrides=json.loads(row["overrides"]),
        name=row["name"],
        priority=row["priority"],
        retries=row["retries"],
        cluster=row["cluster"],
        stored=json.loads(row["stored"]),
    )
    return Schedule(
        name=row["name"],
        recipe=row["recipe"],
        submission=submission,
        trigger=_trigger(row),
        tz=row["tz"],
        overlap=row["overlap"],
        catchup=row["catchup"],
        deadline=row["deadline"],
        paused=bool(row["paused"]),
        created=row["created"],
        cursor=row["cursor"],
        ticks=tuple(Tick(**dict(tick)) for tick in latest.fetchall()),
    )
