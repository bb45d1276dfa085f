"""Schedules and their ticks as rows of the database, and the hand that writes what `schedule.decide` decides.

A tick is one transaction: its row, its job and the schedule's cursor. docs/schedules.md has the rules.
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
_SHOWN = 50  # ticks of one schedule
_MOST_NEXT = 100
_STEPS = 4  # what one call of `tick` settles of one schedule: a batch of missed ticks, the newest, two that are due


class NewSchedule(Submission):
    """What a client asks for: a submission that is made again and again. `name` is the schedule's, and its jobs'."""

    name: str
    priority: Priority = "batch"  # nobody waits for it at a terminal
    cron: str | None = Field(None, max_length=500)
    every: str | None = Field(None, max_length=100)
    tz: str = Field("UTC", max_length=100)
    overlap: Overlap = "skip"
    catchup: Catchup = "none"


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
    paused: bool
    created: float
    cursor: float
    ticks: tuple[Tick, ...] = ()

    def next(self, now: float) -> float | None:
        """The tick to come; None while it is paused, or where it cannot be computed."""
        with contextlib.suppress(InputError):
            return None if self.paused else self.trigger.after(max(now, self.cursor))
        return None


class Schedules:
    """The tables of schedules and ticks. `clock` is asked when somebody changes a schedule."""

    def __init__(self, database: Database, jobs: Jobs, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._jobs = jobs
        self.clock = clock

    def add(self, asked: NewSchedule) -> Schedule:
        """Raises RecipeError or InputError for what cannot work, ConflictError for a name that is taken."""
        if not _NAME.fullmatch(asked.name):
            hint = "a lower-case letter, then up to 62 more letters, digits, - and _"
            raise InputError(f"name {asked.name!r:.80} is not a schedule's name", hint)
        now = self.clock()
        parse_trigger(asked.cron, asked.every, asked.tz, now)
        row = {
            "name": asked.name, "recipe": asked.recipe().name, "source": asked.source, "path": asked.path,
            "folder": asked.folder, "overrides": json.dumps(asked.overrides), "priority": asked.priority,
            "retries": asked.retries, "cron": " ".join(asked.cron.split()) if asked.cron is not None else None,
            "every": parse_every(asked.every) if asked.every is not None else None, "tz": asked.tz,
            "overlap": asked.overlap, "catchup": asked.catchup, "created": now, "cursor": now,
        }  # fmt: skip
        places = ", ".join(f":{name}" for name in row)
        with self._database.write() as connection:
            if connection.execute("SELECT 1 FROM schedules WHERE name = ?", (asked.name,)).fetchone():
                hint = f"take another name, or remove it: moray schedule rm {asked.name}"
                raise ConflictError(f"there is a schedule {asked.name!r} already", hint)
            connection.execute(f"INSERT INTO schedules ({', '.join(row)}) VALUES ({places})", row)
            self._database.record("schedule", asked.name, "added")
            return _load(connection, _row(connection, asked.name))

    def get(self, name: str) -> Schedule:
        """One schedule with its latest ticks. Raises NotFoundError."""
        connection = self._database.read()
        return _load(connection, _row(connection, name), _SHOWN)

    def list(self) -> list[Schedule]:
        """All schedules by name, each with its latest tick."""
        connection = self._database.read()
        rows = connection.execute("SELECT * FROM schedules ORDER BY name").fetchall()
        return [_load(connection, row, 1) for row in rows]

    def as_json(self, schedule: Schedule) -> dict[str, Any]:
        """As docs/http-api.md shows it."""
        asked, trigger = schedule.submission, schedule.trigger
        return {
            "name": schedule.name,
            "recipe": schedule.recipe,
            "set": list(asked.overrides),
            "cron": trigger.text if isinstance(trigger, Cron) else None,
            "every": format_every(trigger.seconds) if isinstance(trigger, Every) else None,
            "tz": schedule.tz,
            "english": trigger.english(),
            "overlap": schedule.overlap,
            "catchup": schedule.catchup,
            "priority": asked.priority,
            "retries": asked.retries,
            "paused": schedule.paused,
            "created": schedule.created,
            "next": schedule.next(self.clock()),
            "ticks": [asdict(tick) for tick in schedule.ticks],
        }

    def next(self, name: str, count: int = 5) -> Sequence[float]:
        """Its next ticks, as if it were not paused. Raises NotFoundError, InputError."""
        if not 1 <= count <= _MOST_NEXT:
            raise InputError(f"n {count} is not between 1 and {_MOST_NEXT}", "for example 5")
        schedule = self.get(name)
        found = [schedule.trigger.after(max(self.clock(), schedule.cursor))]
        while len(found) < count:
            found.append(schedule.trigger.after(found[-1]))
        return found

    def pause(self, name: str) -> Schedule:
        """Skips every tick from now on. Raises NotFoundError, ConflictError."""
        self._settle(name)
        return self._set_paused(name, True)

    def resume(self, name: str) -> Schedule:
        """Ticks again; what came while it was paused stays skipped. Raises NotFoundError, ConflictError."""
        self._settle(name)  # raises InputError for a trigger that cannot be computed: it stays paused
        return self._set_paused(name, False)

    def remove(self, name: str) -> None:
        """Forgets it, but not its jobs and ticks. Raises NotFoundError."""
        with contextlib.suppress(InputError):
            self._settle(name, "removed")
        with self._database.write() as connection:
            _row(connection, name)
            connection.execute("DELETE FROM schedules WHERE name = ?", (name,))
            self._database.record("schedule", name, "removed")

    def tick(self, now: float) -> None:
        """Decides what is due by `now`; after long downtime a part of it, and `next_wake` asks for the next call."""
        for row in self._database.read().execute("SELECT * FROM schedules ORDER BY name").fetchall():
            try:
                for _ in range(_STEPS if _trigger(row).after(row["cursor"]) <= now else 0):
                    self._step(row["name"], now)
            except InputError as error:
                self._give_up(row["name"], error.message)

    def next_wake(self, now: float) -> float:
        """When `tick` has something to do: `now` if it has already, infinity if nothing is scheduled."""
        due = math.inf
        for row in self._database.read().execute("SELECT * FROM schedules WHERE NOT paused").fetchall():
            try:
                due = min(due, _trigger(row).after(row["cursor"]))
            except InputError:
                return now  # `tick` pauses it
        return max(now, due)

    def _settle(self, name: str, held: str = "") -> None:
        """Decides every tick that came before now. Raises NotFoundError, InputError."""
        self.get(name)
        now = self.clock()
        while self._step(name, now, held):
            pass

    def _step(self, name: str, now: float, held: str = "") -> bool:
        """Decides the oldest ticks that are due, in one transaction; False if there are none."""
        schedule, decision = _decide(self._database.read(), name, now, held)
        if schedule is None or decision is None:
            return False
        # Before the transaction: a first look at a recipe may import its steps, and would hold up every writer.
        problem = _problem(schedule.submission) if decision.run else decision.reason
        with self._database.write() as connection:
            if _decide(connection, name, now, held) != (schedule, decision):
                return True  # somebody was faster: look again
            job, reason = (None, problem) if problem else self._submit(schedule, decision)
            self._write(connection, schedule, decision, job, reason, now)
        return True

    def _submit(self, schedule: Schedule, decision: TickDecision) -> tuple[str | None, str]:
        """The job of a tick, or why there is none."""
        key = f"schedule:{schedule.name}:{schedule.created}:{decision.tick}"
        try:
            job, _ = self._jobs.submit(
                schedule.submission, key=key, schedule=schedule.name, tick=decision.tick, exclusive=decision.exclusive
            )
        except MorayError as error:  # the recipe became invalid this instant; it is checked before anything is written
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
        if job is None:  # ticks are decided in order, so the newest row is the one just before
            joined = connection.execute(
                """UPDATE ticks SET until = :until, count = count + :count, decided = :decided
                   WHERE schedule = :schedule AND created = :created AND outcome = 'skipped' AND reason = :reason
                   AND tick = (SELECT max(tick) FROM ticks WHERE schedule = :schedule AND created = :created)""",
                values,
            ).rowcount
        if not joined:
            places = ", ".join(f":{name}" for name in values)
            connection.execute(f"INSERT INTO ticks ({', '.join(values)}) VALUES ({places})", values)
            outcome = str(values["outcome"])
            self._database.record("tick", f"{schedule.name}@{decision.tick:.0f}", outcome, job or reason)
        connection.execute("UPDATE schedules SET cursor = ? WHERE name = ?", (decision.until, schedule.name))

    def _set_paused(self, name: str, paused: bool) -> Schedule:
        with self._database.write() as connection:
            if bool(_row(connection, name)["paused"]) == paused:
                raise ConflictError(f"schedule {name!r} is {'' if paused else 'not '}paused", "there is nothing to do")
            connection.execute("UPDATE schedules SET paused = ? WHERE name = ?", (int(paused), name))
            self._database.record("schedule", name, "paused" if paused else "resumed")
            return _load(connection, _row(connection, name), 1)

    def _give_up(self, name: str, why: str) -> None:
        """Pauses a schedule whose trigger cannot be computed."""
        with self._database.write() as connection:
            changed = connection.execute("UPDATE schedules SET paused = 1 WHERE name = ? AND NOT paused", (name,))
            if changed.rowcount:
                self._database.record("schedule", name, "paused", why)


def _decide(
    connection: sqlite3.Connection, name: str, now: float, held: str
) -> tuple[Schedule | None, TickDecision | None]:
    """A schedule as it is now and what is to be done with its oldest ticks; (None, None) if it was removed."""
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


def _problem(asked: Submission) -> str:
    """Why this cannot be submitted any more; empty if it can."""
    try:
        asked.recipe()
    except MorayError as error:
        return error.message
    except Exception as error:  # a step of another package: what it raises must not stop other schedules
        return f"{type(error).__name__}: {error}"
    return ""


def _names(connection: sqlite3.Connection) -> list[str]:
    return [row["name"] for row in connection.execute("SELECT name FROM schedules ORDER BY name")]


def _row(connection: sqlite3.Connection, name: str) -> sqlite3.Row:
    """Raises NotFoundError."""
    found: sqlite3.Row | None = connection.execute("SELECT * FROM schedules WHERE name = ?", (name,)).fetchone()
    if found is None:
        known = _names(connection)
        hint = nearest(name, known) if known else "there are none; moray schedule add makes one"
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
    asked = Submission(
        source=row["source"],
        path=row["path"],
        folder=row["folder"],
        overrides=json.loads(row["overrides"]),
        name=row["name"],
        priority=row["priority"],
        retries=row["retries"],
    )
    return Schedule(
        name=row["name"],
        recipe=row["recipe"],
        submission=asked,
        trigger=_trigger(row),
        tz=row["tz"],
        overlap=row["overlap"],
        catchup=row["catchup"],
        paused=bool(row["paused"]),
        created=row["created"],
        cursor=row["cursor"],
        ticks=tuple(Tick(**dict(tick)) for tick in latest.fetchall()),
    )
