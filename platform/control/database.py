"""`moray.db`, the database of the control plane. SQLite in WAL mode; the controller is the only writer.

`Database.write()` runs one transaction at a time. Every state change adds a row to `transitions` in the same
transaction, so this log shows the history of each job and tick. `read()` returns connections that see the last
committed state and never block the writer.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moray.platform.core.errors import InputError

_MIGRATIONS: Sequence[str] = (
    """
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        recipe TEXT NOT NULL,               -- the recipe's name
        source TEXT NOT NULL,               -- the recipe's text
        path TEXT NOT NULL,                 -- the recipe's file, for messages
        folder TEXT NOT NULL,               -- base of relative paths in the recipe
        overrides TEXT NOT NULL,            -- JSON list of STEP.FIELD=VALUE
        priority TEXT NOT NULL CHECK (priority IN ('production', 'interactive', 'batch')),
        retries INTEGER NOT NULL,           -- retries after failed attempts
        state TEXT NOT NULL CHECK (state IN
            ('queued', 'starting', 'running', 'stopping', 'succeeded', 'failed', 'cancelled')),
        reason TEXT NOT NULL DEFAULT '',
        stop_requested INTEGER NOT NULL DEFAULT 0,
        not_before REAL NOT NULL DEFAULT 0, -- earliest start of a retry
        created REAL NOT NULL,
        started REAL,
        ended REAL,
        idempotency_key TEXT UNIQUE,
        schedule TEXT,                      -- name of its schedule, kept after the schedule is removed
        exclusive INTEGER NOT NULL DEFAULT 0, -- waits for the other jobs of its schedule (overlap: queue)
        tick REAL
    );
    CREATE INDEX jobs_by_state ON jobs (state);
    CREATE INDEX jobs_by_schedule ON jobs (schedule, state);
    CREATE TABLE attempts (
        id TEXT PRIMARY KEY,                -- job.number; also the name of the run folder
        job TEXT NOT NULL REFERENCES jobs (id),
        number INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN
            ('created', 'submitted', 'running', 'succeeded', 'failed', 'cancelled', 'lost')),
        detail TEXT NOT NULL DEFAULT '',
        created REAL NOT NULL,
        started REAL,
        ended REAL,
        UNIQUE (job, number)
    );
    CREATE INDEX attempts_by_state ON attempts (state);
    CREATE TABLE schedules (
        name TEXT PRIMARY KEY,
        recipe TEXT NOT NULL,
        source TEXT NOT NULL,
        path TEXT NOT NULL,
        folder TEXT NOT NULL,
        overrides TEXT NOT NULL,
        priority TEXT NOT NULL,
        retries INTEGER NOT NULL,
        cron TEXT,
        every REAL,                         -- seconds; exactly one of cron and every
        tz TEXT NOT NULL,
        overlap TEXT NOT NULL CHECK (overlap IN ('skip', 'queue', 'allow')),
        catchup TEXT NOT NULL CHECK (catchup IN ('none', 'last')),
        paused INTEGER NOT NULL DEFAULT 0,
        created REAL NOT NULL,              -- also the anchor of `every`
        cursor REAL NOT NULL                -- all ticks up to this time are decided
    );
    CREATE TABLE ticks (
        schedule TEXT NOT NULL,
        created REAL NOT NULL,              -- of the schedule, because a removed name may be reused
        tick REAL NOT NULL,
        until REAL NOT NULL,                -- a row may cover several skipped ticks with one reason
        count INTEGER NOT NULL,
        outcome TEXT NOT NULL CHECK (outcome IN ('run', 'skipped')),
        job TEXT,
        reason TEXT NOT NULL DEFAULT '',
        decided REAL NOT NULL,
        UNIQUE (schedule, created, tick)
    );
    CREATE TABLE transitions (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        time REAL NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('job', 'attempt', 'schedule', 'tick')),
        id TEXT NOT NULL,
        state TEXT NOT NULL,
        why TEXT NOT NULL DEFAULT ''
    );
    CREATE INDEX transitions_by_id ON transitions (kind, id);
    """,
    """
    ALTER TABLE jobs ADD COLUMN cluster TEXT NOT NULL DEFAULT 'local';
    ALTER TABLE jobs ADD COLUMN stored TEXT NOT NULL DEFAULT '[]';  -- further overrides: the submitter's files
    ALTER TABLE schedules ADD COLUMN stored TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE jobs ADD COLUMN expires REAL;             -- a job that has not started by then is cancelled
    ALTER TABLE schedules ADD COLUMN cluster TEXT NOT NULL DEFAULT 'local';
    ALTER TABLE schedules ADD COLUMN deadline REAL;       -- seconds after its tick by which a job must have started
    """,
    """
    CREATE TABLE deployments (
        name TEXT PRIMARY KEY,
        cluster TEXT NOT NULL,
        model TEXT NOT NULL,                -- as given: an alias, which is followed, or an artifact, or a folder
        port INTEGER NOT NULL,
        replicas INTEGER NOT NULL,
        most_replicas INTEGER NOT NULL,     -- 0: a fixed number of replicas
        target_tokens INTEGER NOT NULL,     -- tokens in flight for each replica, if the number is not fixed
        wanted TEXT NOT NULL CHECK (wanted IN ('running', 'stopped')),
        state TEXT NOT NULL CHECK (state IN
            ('pending', 'starting', 'running', 'rolling', 'failed', 'stopping', 'stopped')),
        reason TEXT NOT NULL DEFAULT '',
        created REAL NOT NULL,
        changed REAL NOT NULL
    );
    CREATE TABLE versions (
        deployment TEXT NOT NULL REFERENCES deployments (name) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        reference TEXT NOT NULL,            -- step/fingerprint of its artifact, or the path of its folder
        arguments TEXT NOT NULL,            -- of its application: a ServedModel, as JSON
        state TEXT NOT NULL CHECK (state IN ('starting', 'live', 'replaced', 'failed')),
        reason TEXT NOT NULL DEFAULT '',
        created REAL NOT NULL,
        since REAL NOT NULL,                -- when it got this state
        UNIQUE (deployment, number)
    );
    CREATE TABLE transitions_3 (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        time REAL NOT NULL,
        kind TEXT NOT NULL,                 -- job, attempt, schedule, tick, deployment or version
        id TEXT NOT NULL,
        state TEXT NOT NULL,
        why TEXT NOT NULL DEFAULT ''
    );
    INSERT INTO transitions_3 SELECT * FROM transitions;
    DROP TABLE transitions;
    ALTER TABLE transitions_3 RENAME TO transitions;
    CREATE INDEX transitions_by_id ON transitions (kind, id);
    """,
)
SCHEMA_VERSION = len(_MIGRATIONS)


class Database:
    """One open `moray.db`, shared by the controller's threads."""

    def __init__(self, path: Path, durable: bool = True) -> None:
        """Opens or creates the file and migrates its schema. Raises InputError if a newer Moray wrote it.

        durable: sync every commit to disk, so that it survives a power failure. Without it, commits survive only the
        end of the process.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30.0)
        self._writer.row_factory = sqlite3.Row
        self._lock = threading.RLock()
        self._readers = threading.local()
        for pragma in ("journal_mode=WAL", f"synchronous={'FULL' if durable else 'OFF'}", "foreign_keys=ON"):
            self._writer.execute(f"PRAGMA {pragma}")
        self._migrate()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Runs the block as one transaction, rolled back on an exception. The same thread may nest calls."""
        with self._lock:
            if self._writer.in_transaction:
                yield self._writer
                return
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")

    def read(self) -> sqlite3.Connection:
        """The read-only connection of the calling thread."""
        found: sqlite3.Connection | None = getattr(self._readers, "connection", None)
        if found is None:
            address = f"{self.path.absolute().as_uri()}?mode=ro"
            found = sqlite3.connect(address, uri=True, isolation_level=None, timeout=30.0)
            found.row_factory = sqlite3.Row
            self._readers.connection = found
        return found

    def record(self, kind: str, name: str, state: str, why: str = "") -> None:
        """Adds a row to `transitions`; call it inside the transaction that changes the state."""
        with self.write() as connection:
            connection.execute(
                "INSERT INTO transitions (time, kind, id, state, why) VALUES (?, ?, ?, ?, ?)",
                (time.time(), kind, name, state, why),
            )

    def close(self) -> None:
        self._writer.close()

    def _migrate(self) -> None:
        version = int(self._writer.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise InputError(
                f"{self.path} has schema version {version}; this version of Moray supports up to {SCHEMA_VERSION}",
                "use the newer version of Moray, or another MORAY_HOME",
            )
        for number in range(version, SCHEMA_VERSION):
            script = f"BEGIN IMMEDIATE; {_MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;"
            self._writer.executescript(script)
