"""The loop of the control plane: look at everything, decide by pure functions, write it down, act on it.

Level-triggered: every round starts from the database and from what is there to be seen, never from a message, so a
round may be killed at any point and the next one does the rest. Effects on the cluster are repeatable by attempt id.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moray.platform.control.attempt import AttemptOrder, Outcome, end_with, lease_of, read_order, read_outcome
from moray.platform.control.database import Database
from moray.platform.control.jobs import ATTEMPT_ENDED, ENDED, Attempt, Job, Jobs
from moray.platform.control.queue import IN_FLIGHT, choose_jobs, why_waiting
from moray.platform.control.reconcile import STOP_SECONDS, AttemptAction, Sight, after, judge_attempt
from moray.platform.control.schedules import Schedules
from moray.platform.core.atomic import write_text
from moray.platform.core.cluster import BackendAwayError, ClusterBackend, Observed, Topology
from moray.platform.core.home import Home
from moray.platform.core.processes import boot
from moray.platform.store.lease import is_stale

ROUND_SECONDS = 1.0


@dataclass
class _Watch:
    """What the controller remembers of an attempt between rounds; lost with it, and then learnt again."""

    last_sign: float  # monotonic: when it was last seen alive, or ordered
    met: bool = False
    told_to_stop: float | None = None


class Controller:
    """Moves jobs, attempts and schedules along."""

    def __init__(
        self,
        home: Home,
        database: Database,
        backend: ClusterBackend,
        address: str,
        topology: Topology,
        slots: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self.jobs = Jobs(database)
        self.schedules = Schedules(database, self.jobs)
        self.slots = slots
        self.away = ""  # why the cluster cannot be seen; empty while it can
        self._home = home
        self._database = database
        self._backend = backend
        self._address = address
        self._topology = topology
        self._say = say
        self._watches: dict[str, _Watch] = {}
        self._zombies: dict[str, float] = {}  # when we last told them to stop
        self._wake = threading.Event()
        self._stop = threading.Event()

    def wake(self) -> None:
        """Makes the next round begin now."""
        self._wake.set()

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()

    def run(self) -> None:
        """Rounds until `stop()`."""
        while not self._stop.is_set():
            self._guarded("round", self.round)
            self._wake.wait(ROUND_SECONDS)
            self._wake.clear()

    def round(self) -> None:
        """One look at everything. What goes wrong with one job keeps no other from moving."""
        self._guarded("schedules", lambda: self.schedules.tick(time.time()))
        observed = self._observe()
        for job in self.jobs.open():
            if job.state in IN_FLIGHT:
                self._guarded(job.id, partial(self._look_after, job, observed))
        if observed is not None:
            self._tidy(observed)
            for job in choose_jobs(self.jobs.open(), self.slots, time.time()):
                attempt = self.jobs.new_attempt(job.id)
                self._say(f"{attempt.id}: started")
                self._guarded(job.id, partial(self._look_after, self.jobs.get(job.id), observed))

    def _guarded(self, what: str, act: Callable[[], None]) -> None:
        """Says what went wrong; the next round tries again."""
        try:
            act()
        except Exception as error:
            self._say(f"{what}: {type(error).__name__}: {error}")

    def why(self, job: Job) -> list[str]:
        """Why a job is where it is, for people."""
        if job.state == "queued":
            lines = why_waiting(job, self.jobs.open(), self.slots, time.time())
        elif job.state in ENDED:
            lines = [job.reason or f"it {job.state}"]
        else:
            lines = [f"attempt {job.latest.number} is {job.latest.state}" if job.latest else job.reason]
            if job.state == "stopping":
                lines.append("it was asked to stop")
        if self.away and job.state not in ENDED:
            lines.append(f"the cluster is away: {self.away}")
        past = [a for a in job.attempts if a.state in ("failed", "lost") and a is not job.latest]
        return lines + [f"attempt {a.number} {a.state}: {a.detail}" for a in past]

    def _observe(self) -> Mapping[str, Observed] | None:
        """Everything the cluster knows; None while it is away."""
        try:
            found = self._backend.observe()
        except BackendAwayError as error:
            self.away = str(error)
            return None
        self.away = ""
        return found

    def _look_after(self, job: Job, observed: Mapping[str, Observed] | None) -> None:
        attempt = job.latest
        if attempt is None or attempt.state in ATTEMPT_ENDED:
            raise RuntimeError(f"job {job.id} is {job.state} without an open attempt")
        sight = self._see(attempt, observed)
        # Nobody is given up while the cluster cannot be asked: what does not answer may be coming back.
        if observed is None and sight.outcome is None and not sight.alive:
            return
        self._apply(job, attempt, judge_attempt(job, attempt, sight))

    def _see(self, attempt: Attempt, observed: Mapping[str, Observed] | None) -> Sight:
        now = time.monotonic()
        run = self._home.runs / attempt.id
        if attempt.id not in self._watches:
            self._watches[attempt.id] = _Watch(_ordered(run, now), met=attempt.state == "running")
        watch = self._watches[attempt.id]
        alive = not is_stale(lease_of(run).path)  # before the outcome: a driver that ends now has written one
        if alive or (watch.met and observed is None):
            watch.last_sign = now
        watch.met = watch.met or alive
        return Sight(
            observed=(observed or {}).get(attempt.id),
            alive=alive,
            met=watch.met,
            outcome=read_outcome(run),
            silent=now - watch.last_sign,
            since_stop=None if watch.told_to_stop is None else now - watch.told_to_stop,
        )

    def _apply(self, job: Job, attempt: Attempt, verdict: AttemptAction) -> None:
        if verdict.stop:
            self._watches[attempt.id].told_to_stop = time.monotonic()
            self._try(lambda: self._backend.stop(attempt.id))
        if verdict.submit:
            self._submit(job, attempt)
        if verdict.state is None:
            return
        if verdict.state not in ATTEMPT_ENDED:
            with self._database.write():
                self.jobs.move_attempt(attempt.id, verdict.state)
                if job.state == "starting":
                    self.jobs.move(job.id, "running")
            return
        self._end(job, attempt, verdict)

    def _tidy(self, observed: Mapping[str, Observed]) -> None:
        """Has the cluster forget what has ended, and end what it should have forgotten."""
        open_ = {
            attempt.id for job in self.jobs.open() for attempt in job.attempts if attempt.state not in ATTEMPT_ENDED
        }
        for name in observed.keys() - open_:
            if observed[name].state in ("pending", "running"):
                if time.monotonic() - self._zombies.get(name, -STOP_SECONDS) >= STOP_SECONDS:
                    self._zombies[name] = time.monotonic()
                    self._try(lambda: self._backend.stop(name))  # noqa: B023 (called at once)
            else:
                self._zombies.pop(name, None)
                self._try(lambda: self._backend.forget(name))  # noqa: B023

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
        if self._try(lambda: self._backend.submit(attempt.id, {"MORAY_HOME": str(self._home.root)})):
            self._watches[attempt.id].last_sign = time.monotonic()
            self.jobs.move_attempt(attempt.id, "submitted")

    def _end(self, job: Job, attempt: Attempt, verdict: AttemptAction) -> None:
        """Ends an attempt, and with it the job or only this try at it."""
        assert verdict.state is not None
        run = self._home.runs / attempt.id
        if read_outcome(run) is None and not end_with(run, Outcome(state="cancelled", detail=verdict.detail)):
            return  # its driver had the last word just now; the next round hears it
        ahead = after(job, verdict.state, verdict.detail, verdict.again)
        with self._database.write():
            self.jobs.move_attempt(attempt.id, verdict.state, verdict.detail)
            self.jobs.move(job.id, ahead.state, ahead.reason, time.time() + ahead.delay if ahead.delay else 0.0)
        del self._watches[attempt.id]
        self._say(f"{attempt.id}: {verdict.state} {verdict.detail}")

    def _try(self, act: Callable[[], None]) -> bool:
        """An effect on the cluster; False if it is away, and a later round tries again."""
        try:
            act()
        except BackendAwayError as error:
            self.away = str(error)
            return False
        return True


def _ordered(run: Path, now: float) -> float:
    """When the attempt was ordered, by this boot's monotonic clock; now, if that was never or before a reboot.

    A controller that is killed again and again must not begin to wait anew each time.
    """
    order = read_order(run)
    return order.ordered if order is not None and order.boot == boot() else now
