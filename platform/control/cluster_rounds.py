"""The rounds of one cluster: observe its attempts, decide by pure functions, record the decisions, act on them.

Every round starts from the database and from the observed state, never from a message, so a round may be killed at any
point and the next one completes it. Actions on the cluster are idempotent per attempt id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from moray.platform.control.attempt import AttemptFiles, AttemptOrder, Outcome
from moray.platform.control.database import Database
from moray.platform.control.jobs import ATTEMPT_ENDED, Attempt, Job, Jobs
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.control.queue import choose_jobs
from moray.platform.control.reconcile import (
    STOP_SECONDS,
    AttemptAction,
    AttemptObservation,
    decide_attempt,
    decide_job,
)
from moray.platform.core.cluster import BackendUnreachableError, Observed, Usage
from moray.platform.core.errors import (
    InputError,
    MorayError,
    StoreRefusedError,
    StoreUnreachableError,
    UnavailableError,
)
from moray.platform.core.home import Home
from moray.platform.core.processes import boot
from moray.platform.store.paths import in_threads

_REFUSED_SECONDS = 30.0  # that a store may refuse requests before an ended attempt fails
_RENEWAL_SECONDS = 10.0  # between readings of a profile
_USAGE_SECONDS = 5.0  # between requests for the use of a cluster


@dataclass
class _Liveness:
    """In-memory record of an attempt between rounds, rebuilt after a restart. Times are monotonic seconds."""

    files: AttemptFiles
    last_alive: float  # when the driver was last seen alive, or else when the attempt was ordered
    refused: float | None = None  # since when the store refuses requests
    was_alive: bool = False
    stop_sent: float | None = None


class ClusterRounds:
    """Advances the jobs of one cluster. `log` receives one line of text per event. `succeeded` is called before the
    success of an attempt is recorded, more than once if the controller is killed in between.

    error: why the cluster or its store does not respond; empty while they do. usage: of a cluster other than the local
    one, a few seconds old; None if it is unknown. drivers: the host of each driver that the cluster lists, by
    attempt.
    """

    def __init__(
        self,
        home: Home,
        database: Database,
        jobs: Jobs,
        cluster: ManagedCluster,
        log: Callable[[str], None],
        succeeded: Callable[[Attempt], None] = lambda attempt: None,
    ) -> None:
        self.cluster = cluster
        self.error = ""
        self.usage: Usage | None = None
        self.drivers: Mapping[str, str] = {}
        self._usage_due = 0.0
        self._renewal_due = time.monotonic() + _RENEWAL_SECONDS
        self._home, self._database, self._jobs, self._log = home, database, jobs, log
        self._succeeded = succeeded
        self._liveness: dict[str, _Liveness] = {}
        self._zombies: dict[str, float] = {}  # attempt id -> monotonic time of the last stop request

    def renew(self, find: Callable[[str], ManagedCluster]) -> None:
        """Reads the profile of the cluster again, which may have another address or other credentials now."""
        if time.monotonic() < self._renewal_due:
            return
        self._renewal_due = time.monotonic() + _RENEWAL_SECONDS
        found = find(self.cluster.name)
        if found.version != self.cluster.version:
            self.cluster = found
            self._liveness.clear()

    def round(self) -> None:
        """Runs one round. An error in one job does not hold up the others."""
        observed = self._observe()
        mine = self._jobs.in_flight(self.cluster.name)
        in_threads(self._bring, [job.latest for job in mine if job.latest])
        for job in mine:
            self.guarded(job.id, partial(self._reconcile, job, observed))
        if observed is not None:
            self._clean_up(observed)
            for job in self._startable():
                attempt = self._jobs.new_attempt(job.id)
                self._log(f"{attempt.id}: started")
                self.guarded(job.id, partial(self._reconcile, self._jobs.get(job.id), observed))

    def guarded(self, name: str, act: Callable[[], None]) -> None:
        """Calls `act` and logs an error under `name`; the next round tries again."""
        try:
            act()
        except InputError as error:  # of the store
            self.error = error.message
        except Exception as error:
            self.error = f"{name}: {type(error).__name__}: {error}"
            self._log(self.error)

    def _startable(self) -> Sequence[Job]:
        """The queued jobs that start now. The queue is only read if there is a free slot: it may be long."""
        if len(self._jobs.in_flight(self.cluster.name)) >= self.cluster.slots:
            return []
        return choose_jobs(self._jobs.open(self.cluster.name), self.cluster.slots, time.time())

    def _observe(self) -> Mapping[str, Observed] | None:
        """The attempts that the cluster lists; None while it is unreachable."""
        try:
            found = self.cluster.backend.observe()
            if self.cluster.store and time.monotonic() >= self._usage_due:
                self.usage = self.cluster.backend.usage()
                self._usage_due = time.monotonic() + _USAGE_SECONDS
        except BackendUnreachableError as error:
            self.error, self.usage, self.drivers = str(error), None, {}
            return None
        self.error = ""
        self.drivers = {name: one.host for name, one in found.items() if one.host and one.state == "running"}
        return found

    def _record(self, attempt: Attempt) -> _Liveness:
        if attempt.id not in self._liveness:
            files = self.cluster.files(self._home, attempt.id)
            ordered = _ordered(files, time.monotonic())
            self._liveness[attempt.id] = _Liveness(files, ordered, was_alive=attempt.state == "running")
        return self._liveness[attempt.id]

    def _bring(self, attempt: Attempt) -> None:
        def bring() -> None:
            self._record(attempt).files.bring()

        self.guarded(attempt.id, bring)

    def _reconcile(self, job: Job, observed: Mapping[str, Observed] | None) -> None:
        attempt = job.latest
        if attempt is None or attempt.state in ATTEMPT_ENDED:
            raise RuntimeError(f"job {job.id} is {job.state} without an open attempt")
        try:
            seen = self._observe_attempt(attempt, observed)
            # While the cluster is unreachable, no silent attempt is declared lost: the cluster may come back with it.
            if observed is None and seen.outcome is None and not seen.alive:
                return
            self._apply(job, attempt, decide_attempt(job, attempt, seen))
        except StoreRefusedError as error:
            self._refused(job, attempt, (observed or {}).get(attempt.id), error)
            return
        if attempt.id in self._liveness:
            self._liveness[attempt.id].refused = None

    def _refused(self, job: Job, attempt: Attempt, observed: Observed | None, error: StoreRefusedError) -> None:
        """Ends the attempt of a driver that has ended, if its outcome can neither be read nor recorded for long. An
        outage is different: then the attempt waits for the store."""
        record, now = self._record(attempt), time.monotonic()
        record.refused = now if record.refused is None else record.refused
        if observed is None or observed.state in ("pending", "running") or now - record.refused < _REFUSED_SECONDS:
            raise error
        with self._database.write():
            self._jobs.move_attempt(attempt.id, "failed", error.message)
            self._jobs.move(job.id, "failed", error.message)
        del self._liveness[attempt.id]

    def _observe_attempt(self, attempt: Attempt, observed: Mapping[str, Observed] | None) -> AttemptObservation:
        record, now = self._record(attempt), time.monotonic()
        # The lease is read before the outcome, because a driver writes its outcome before it releases the lease.
        alive = record.files.is_alive()
        if alive or (record.was_alive and observed is None):
            record.last_alive = now
        record.was_alive = record.was_alive or alive
        return AttemptObservation(
            observed=(observed or {}).get(attempt.id),
            alive=alive,
            was_alive=record.was_alive,
            outcome=record.files.read_outcome(),
            silent=now - record.last_alive,
            since_stop=None if record.stop_sent is None else now - record.stop_sent,
        )

    def _apply(self, job: Job, attempt: Attempt, action: AttemptAction) -> None:
        if action.stop:
            self._liveness[attempt.id].stop_sent = time.monotonic()
            self._on_cluster(lambda: self.cluster.backend.stop(attempt.id))
        if action.submit:
            self._submit(job, attempt)
        if action.state is None:
            return
        if action.state not in ATTEMPT_ENDED:
            with self._database.write():
                self._jobs.move_attempt(attempt.id, action.state)
                if job.state == "starting":
                    self._jobs.move(job.id, "running")
            return
        self._end(job, attempt, action)

    def _clean_up(self, observed: Mapping[str, Observed]) -> None:
        """Removes ended attempts from the cluster's list and stops zombies, ended attempts that still run there.

        Attempts that this controller does not know are those of another one, or of a person: they stay.
        """
        known = self._jobs.known_attempts(observed.keys())
        for name, state in known.items():
            if state not in ATTEMPT_ENDED:
                continue
            if observed[name].state in ("pending", "running"):
                if time.monotonic() - self._zombies.get(name, -STOP_SECONDS) >= STOP_SECONDS:
                    self._zombies[name] = time.monotonic()
                    self._on_cluster(lambda: self.cluster.backend.stop(name))  # noqa: B023 (called at once)
            else:
                self._zombies.pop(name, None)
                self._on_cluster(lambda: self.cluster.backend.forget(name))  # noqa: B023

    def _submit(self, job: Job, attempt: Attempt) -> None:
        def act() -> None:
            topology = self.cluster.topology()
            order = AttemptOrder(
                source=job.source,
                path=job.path,
                folder=job.folder,
                overrides=(*job.overrides, *job.stored),
                address=self.cluster.address,
                cpus=topology.cpus,
                gpus=topology.gpus,
                memory_bytes=topology.memory_bytes,
                ordered=time.monotonic(),
                boot=boot(),
                cluster=self.cluster.name,
            )
            self._liveness[attempt.id].files.write_order(order)
            self.cluster.backend.submit(attempt.id, self.cluster.environment)

        if self._on_cluster(act):
            self._liveness[attempt.id].last_alive = time.monotonic()
            self._jobs.move_attempt(attempt.id, "submitted")

    def _end(self, job: Job, attempt: Attempt, action: AttemptAction) -> None:
        """Ends an attempt; its job ends too or is queued for a retry."""
        assert action.state is not None
        files = self._liveness[attempt.id].files
        if files.read_outcome() is None and not files.record_outcome(Outcome(state="cancelled", detail=action.detail)):
            return  # the driver has just recorded an outcome; the next round reads it
        self.guarded(attempt.id, files.bring)  # the last events and lines of the log
        if action.state == "succeeded":
            self._after_success(attempt)
        then = decide_job(job, action.state, action.detail, action.retryable)
        with self._database.write():
            self._jobs.move_attempt(attempt.id, action.state, action.detail)
            self._jobs.move(job.id, then.state, then.reason, time.time() + then.delay if then.delay else 0.0)
        del self._liveness[attempt.id]
        self._log(f"{attempt.id}: {action.state} {action.detail}")

    def _after_success(self, attempt: Attempt) -> None:
        """Calls `succeeded`. Raises StoreUnreachableError and UnavailableError, after which the next round ends the
        attempt."""
        try:
            self._succeeded(attempt)
        except (StoreUnreachableError, UnavailableError):
            raise
        except MorayError as error:
            self._log(f"{attempt.id}: {error.message}")
        except Exception as error:  # a file of the run that cannot be read does not keep the job from ending
            self._log(f"{attempt.id}: {type(error).__name__}: {error}")

    def _on_cluster(self, act: Callable[[], None]) -> bool:
        """Calls `act`, an action on the cluster; False if the cluster is unreachable. A later round tries again."""
        try:
            act()
        except BackendUnreachableError as error:
            self.error = str(error)
            return False
        return True


def _ordered(files: AttemptFiles, now: float) -> float:
    """Monotonic time at which the attempt was ordered; `now` if it was not ordered since the last boot.

    The time is read from `attempt.json`, so that restarts of the controller do not extend the timeout.
    """
    order = files.read_order()
    return order.ordered if order is not None and order.boot == boot() else now
