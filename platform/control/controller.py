"""The control loop: observe the state, decide by pure functions, record the decision, act on it.

The loop is level-triggered. Every round starts from the database and from the observed state, never from a message, so
a round may be killed at any point and the next one completes it. Actions on the cluster are idempotent per attempt id.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moray.platform.control.attempt import AttemptOrder, Outcome, lease_of, read_order, read_outcome, record_outcome
from moray.platform.control.database import Database
from moray.platform.control.jobs import ATTEMPT_ENDED, ENDED, Attempt, Job, Jobs
from moray.platform.control.queue import IN_FLIGHT, choose_jobs, why_waiting
from moray.platform.control.reconcile import (
    STOP_SECONDS,
    AttemptAction,
    AttemptObservation,
    decide_attempt,
    decide_job,
)
from moray.platform.control.schedules import Schedules
from moray.platform.core.atomic import write_text
from moray.platform.core.cluster import BackendUnreachableError, ClusterBackend, Observed, Topology
from moray.platform.core.home import Home
from moray.platform.core.processes import boot
from moray.platform.store.lease import is_stale

ROUND_SECONDS = 1.0


@dataclass
class _Liveness:
    """In-memory record of an attempt between rounds, rebuilt after a restart. Times are monotonic seconds."""

    last_alive: float  # when the driver was last seen alive, or else when the attempt was ordered
    was_alive: bool = False
    stop_sent: float | None = None


class Controller:
    """Advances jobs, attempts and schedules. `log` receives one line of text per event."""

    def __init__(
        self,
        home: Home,
        database: Database,
        backend: ClusterBackend,
        address: str,
        topology: Topology,
        slots: int,
        log: Callable[[str], None] = print,
    ) -> None:
        self.jobs = Jobs(database)
        self.schedules = Schedules(database, self.jobs)
        self.slots = slots
        self.cluster_error = ""  # why the cluster is unreachable; empty while it answers
        self._home = home
        self._database = database
        self._backend = backend
        self._address = address
        self._topology = topology
        self._log = log
        self._liveness: dict[str, _Liveness] = {}
        self._zombies: dict[str, float] = {}  # attempt id -> monotonic time of the last stop request
        self._wake = threading.Event()
        self._stop = threading.Event()

    def wake(self) -> None:
        """Starts the next round now."""
        self._wake.set()

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()

    def run(self) -> None:
        """Runs rounds until `stop()` is called."""
        while not self._stop.is_set():
            self._guarded("round", self.round)
            self._wake.wait(ROUND_SECONDS)
            self._wake.clear()

    def round(self) -> None:
        """Runs one round. An error in one job does not hold up the others."""
        self._guarded("schedules", lambda: self.schedules.tick(time.time()))
        observed = self._observe()
        for job in self.jobs.open():
            if job.state in IN_FLIGHT:
                self._guarded(job.id, partial(self._reconcile, job, observed))
        if observed is not None:
            self._clean_up(observed)
            for job in choose_jobs(self.jobs.open(), self.slots, time.time()):
                attempt = self.jobs.new_attempt(job.id)
                self._log(f"{attempt.id}: started")
                self._guarded(job.id, partial(self._reconcile, self.jobs.get(job.id), observed))

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        """Calls `act` and logs an error under `name`; the next round tries again."""
        try:
            act()
        except Exception as error:
            self._log(f"{name}: {type(error).__name__}: {error}")

    def why(self, job: Job) -> list[str]:
        """Reasons for a job's current state, as text for `moray why` and the page."""
        if job.state == "queued":
            lines = why_waiting(job, self.jobs.open(), self.slots, time.time())
        elif job.state in ENDED:
            lines = [job.reason or f"the job {'was ' if job.state == 'cancelled' else ''}{job.state}"]
        else:
            lines = [f"attempt {job.latest.number} is {job.latest.state}" if job.latest else job.reason]
            if job.state == "stopping":
                lines.append("stop requested; waiting for the driver to end")
        if self.cluster_error and job.state not in ENDED:
            lines.append(f"the cluster is unreachable: {self.cluster_error}")
        past = [a for a in job.attempts if a.state in ("failed", "lost") and a is not job.latest]
        return lines + [f"attempt {a.number} {a.state}: {a.detail}" for a in past]

    def _observe(self) -> Mapping[str, Observed] | None:
        """The attempts that the cluster lists; None while it is unreachable."""
        try:
            found = self._backend.observe()
        except BackendUnreachableError as error:
            self.cluster_error = str(error)
            return None
        self.cluster_error = ""
        return found

    def _reconcile(self, job: Job, observed: Mapping[str, Observed] | None) -> None:
        attempt = job.latest
        if attempt is None or attempt.state in ATTEMPT_ENDED:
            raise RuntimeError(f"job {job.id} is {job.state} without an open attempt")
        seen = self._observe_attempt(attempt, observed)
        # While the cluster is unreachable, no silent attempt is declared lost: the cluster may come back with it.
        if observed is None and seen.outcome is None and not seen.alive:
            return
        self._apply(job, attempt, decide_attempt(job, attempt, seen))

    def _observe_attempt(self, attempt: Attempt, observed: Mapping[str, Observed] | None) -> AttemptObservation:
        now = time.monotonic()
        run = self._home.runs / attempt.id
        if attempt.id not in self._liveness:
            self._liveness[attempt.id] = _Liveness(_ordered(run, now), was_alive=attempt.state == "running")
        record = self._liveness[attempt.id]
        # The lease is read before the outcome, because a driver writes its outcome before it releases the lease.
        alive = not is_stale(lease_of(run).path)
        if alive or (record.was_alive and observed is None):
            record.last_alive = now
        record.was_alive = record.was_alive or alive
        return AttemptObservation(
            observed=(observed or {}).get(attempt.id),
            alive=alive,
            was_alive=record.was_alive,
            outcome=read_outcome(run),
            silent=now - record.last_alive,
            since_stop=None if record.stop_sent is None else now - record.stop_sent,
        )

    def _apply(self, job: Job, attempt: Attempt, action: AttemptAction) -> None:
        if action.stop:
            self._liveness[attempt.id].stop_sent = time.monotonic()
            self._on_cluster(lambda: self._backend.stop(attempt.id))
        if action.submit:
            self._submit(job, attempt)
        if action.state is None:
            return
        if action.state not in ATTEMPT_ENDED:
            with self._database.write():
                self.jobs.move_attempt(attempt.id, action.state)
                if job.state == "starting":
                    self.jobs.move(job.id, "running")
            return
        self._end(job, attempt, action)

    def _clean_up(self, observed: Mapping[str, Observed]) -> None:
        """Removes ended attempts from the cluster's list and stops zombies, ended attempts that still run there."""
        open_ = {
            attempt.id for job in self.jobs.open() for attempt in job.attempts if attempt.state not in ATTEMPT_ENDED
        }
        for name in observed.keys() - open_:
            if observed[name].state in ("pending", "running"):
                if time.monotonic() - self._zombies.get(name, -STOP_SECONDS) >= STOP_SECONDS:
                    self._zombies[name] = time.monotonic()
                    self._on_cluster(lambda: self._backend.stop(name))  # noqa: B023 (called at once)
            else:
                self._zombies.pop(name, None)
                self._on_cluster(lambda: self._backend.forget(name))  # noqa: B023

    def _submit(self, job: Job, attempt: Attempt) -> None:
        order = AttemptOrder(
            source=job.source,
            path=job.path,
            folder=job.folder,
            overrides=job.overrides,
            address=self._address,
            cpus=self._topology.cpus,
            gpus=self._topology.gpus,
            memory_bytes=self._topology.memory_bytes,
            ordered=time.monotonic(),
            boot=boot(),
        )
        write_text(self._home.runs / attempt.id / "attempt.json", order.model_dump_json(indent=2) + "\n")
        if self._on_cluster(lambda: self._backend.submit(attempt.id, {"MORAY_HOME": str(self._home.root)})):
            self._liveness[attempt.id].last_alive = time.monotonic()
            self.jobs.move_attempt(attempt.id, "submitted")

    def _end(self, job: Job, attempt: Attempt, action: AttemptAction) -> None:
        """Ends an attempt; its job ends too or is queued for a retry."""
        assert action.state is not None
        run = self._home.runs / attempt.id
        if read_outcome(run) is None and not record_outcome(run, Outcome(state="cancelled", detail=action.detail)):
            return  # the driver has just recorded an outcome; the next round reads it
        then = decide_job(job, action.state, action.detail, action.retryable)
        with self._database.write():
            self.jobs.move_attempt(attempt.id, action.state, action.detail)
            self.jobs.move(job.id, then.state, then.reason, time.time() + then.delay if then.delay else 0.0)
        del self._liveness[attempt.id]
        self._log(f"{attempt.id}: {action.state} {action.detail}")

    def _on_cluster(self, act: Callable[[], None]) -> bool:
        """Calls `act`, an action on the cluster; False if the cluster is unreachable. A later round tries again."""
        try:
            act()
        except BackendUnreachableError as error:
            self.cluster_error = str(error)
            return False
        return True


def _ordered(run: Path, now: float) -> float:
    """Monotonic time at which the attempt was ordered; `now` if it was not ordered since the last boot.

    The time is read from `attempt.json`, so that restarts of the controller do not extend the timeout.
    """
    order = read_order(run)
    return order.ordered if order is not None and order.boot == boot() else now
