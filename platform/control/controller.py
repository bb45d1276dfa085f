"""The controller: decides the ticks of schedules, and runs the rounds of every cluster (cluster_rounds.py).

Each cluster has its own thread, so that a slow or absent one does not hold up the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial

from moray.platform.control.approvals import deploy_approved
from moray.platform.control.choices import LOCAL
from moray.platform.control.cluster_rounds import ClusterRounds
from moray.platform.control.database import Database
from moray.platform.control.deployment_rounds import DeploymentRounds
from moray.platform.control.deployments import Deployment, Deployments
from moray.platform.control.jobs import ENDED, Attempt, ConflictError, Job, Jobs
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.control.queue import why_waiting
from moray.platform.control.room import reservation
from moray.platform.control.schedules import Schedules
from moray.platform.core.errors import InputError, MorayError
from moray.platform.core.home import Home

ROUND_SECONDS = 1.0
_REMOTE_SECONDS = 2.0  # between the rounds of a cluster whose files are in a store

FindCluster = Callable[[str], ManagedCluster]  # by name; raises InputError


class Controller:
    """Advances jobs, attempts and schedules. `log` receives one line of text per event.

    find: how clusters other than the local one are found. A cluster gets its rounds when a job names it.
    """

    def __init__(
        self,
        home: Home,
        database: Database,
        local: ManagedCluster,
        find: FindCluster | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        self.jobs = Jobs(database)
        self.schedules = Schedules(database, self.jobs)
        self.deployments = Deployments(database)
        self._home, self._database, self._log = home, database, log
        self._find = find or _no_cluster
        self._rounds: dict[str, ClusterRounds] = {}
        self._serving: dict[str, DeploymentRounds] = {}
        self._lock = threading.Lock()
        self._running = False
        self._threads: list[threading.Thread] = []
        self._problems: dict[str, str] = {}  # why the profile of a cluster cannot be read, by name
        self._wakes: list[threading.Event] = []
        self._stop = threading.Event()
        self._own = local.name
        self._add(local)

    @property
    def slots(self) -> int:
        """Jobs that the local cluster runs at the same time."""
        return self._rounds[LOCAL].cluster.slots

    def clusters(self) -> Mapping[str, ClusterRounds]:
        """The clusters that have been used, by name."""
        with self._lock:
            return dict(self._rounds)

    def cluster(self, name: str) -> ClusterRounds:
        """The cluster with this name. Raises InputError if there is none, or if its profile is wrong."""
        with self._lock:
            known = self._rounds.get(name)
        if known is not None:
            return known
        return self._add(self._find(name))

    def problem(self, name: str) -> str:
        """Why a cluster that jobs wait for has not been found."""
        return self._problems.get(name, "its profile has not been read yet")

    def wake(self) -> None:
        """Starts the next round of every cluster now."""
        with self._lock:
            for event in self._wakes:
                event.set()

    def stop(self) -> None:
        self._stop.set()
        self.wake()

    def run(self) -> None:
        """Runs rounds until `stop()` is called."""
        with self._lock:
            self._running = True
            for name in self._rounds:
                self._start(name)
        while not self._stop.wait(ROUND_SECONDS):
            self._tick()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(10)

    def round(self) -> None:
        """Runs one round of everything in this thread, one cluster after the other."""
        self._tick()
        for name, rounds in self.clusters().items():
            rounds.guarded("round", rounds.round)
            rounds.guarded("deployments", self._serving[name].round)

    def serving(self, name: str) -> DeploymentRounds:
        """The rounds of a cluster's deployments. Raises InputError as `cluster`."""
        self.cluster(name)
        with self._lock:
            return self._serving[name]

    def serving_or_none(self, name: str) -> DeploymentRounds | None:
        """The rounds of a cluster's deployments; None if the cluster has not been used."""
        with self._lock:
            return self._serving.get(name)

    def is_lost(self, name: str) -> bool:
        """Whether a cluster's deployments cannot be reached: it does not respond, or its profile is gone."""
        try:
            return bool(self.serving(name).error)
        except MorayError:
            return True

    def check_rollback(self, name: str, to: int | None) -> None:
        """Raises ConflictError if the version that a rollback leads to cannot be read."""
        deployment = self.deployments.get(name)
        number = to or (deployment.previous.number if deployment.previous else 0)
        for version in deployment.versions:
            if version.number == number and (gone := self.serving(deployment.cluster).gone(version)):
                raise ConflictError(f"version {number} of {name!r} cannot be served: {gone}", "name another with --to")

    def why(self, job: Job) -> list[str]:
        """Reasons for a job's current state, as text for `moray why` and the page."""
        rounds = self.clusters().get(job.cluster)
        if job.state == "queued":
            lines = self._why_queued(job, rounds)
        elif job.state in ENDED:
            lines = [job.reason or f"the job {'was ' if job.state == 'cancelled' else ''}{job.state}"]
        else:
            lines = [f"attempt {job.latest.number} is {job.latest.state}" if job.latest else job.reason]
            if job.state == "stopping":
                lines.append("stop requested; waiting for the driver to end")
        if rounds and rounds.error and job.state not in ENDED:
            lines.append(f"the cluster is unreachable: {rounds.error}")
        if job.state not in ENDED:
            lines += self._reserved(job.cluster)
        past = [a for a in job.attempts if a.state in ("failed", "lost") and a is not job.latest]
        return lines + [f"attempt {a.number} {a.state}: {a.detail}" for a in past]

    def why_deployment(self, deployment: Deployment) -> list[str]:
        """Reasons for a deployment's current state, and what else holds resources of its cluster."""
        lines = [f"{deployment.state}: {deployment.reason}" if deployment.reason else f"it is {deployment.state}"]
        if deployment.wanted == "running":
            jobs = [job.id for job in self.jobs.in_flight(deployment.cluster)]
            lines += self._reserved(deployment.cluster)
            lines += [f"jobs that run on cluster {deployment.cluster!r}: {', '.join(jobs)}"] if jobs else []
        return lines

    def _reserved(self, cluster: str) -> list[str]:
        """What the deployments of a cluster reserve, in one line, if there are any."""
        found = [one for one in self.deployments.all(cluster) if one.wanted == "running" and one.desired]
        shares = [f"{one.name} {reservation(one)}" for one in found]
        return [f"deployments on cluster {cluster!r} reserve: {'; '.join(shares)}"] if shares else []

    def _why_queued(self, job: Job, rounds: ClusterRounds | None) -> list[str]:
        if rounds is None:
            return [f"waiting for cluster {job.cluster!r}: {self.problem(job.cluster)}"]
        return why_waiting(job, self.jobs.open(job.cluster), rounds.cluster.slots, time.time())

    def _tick(self) -> None:
        """Decides the ticks of schedules, and finds the clusters of queued jobs."""
        try:
            self.schedules.tick(time.time())
            for job in self.jobs.expire(time.time()):
                self._log(f"{job.id}: {job.reason}")
        except Exception as error:
            self._log(f"schedules: {type(error).__name__}: {error}")
        used = {cluster for cluster, _ in self.jobs.open_counts()} | self.deployments.clusters()
        for name in used - set(self.clusters()):
            try:
                self.cluster(name)
                self._problems.pop(name, None)
            except MorayError as error:
                self._problems[name] = error.message
            except Exception as error:
                self._problems[name] = f"{type(error).__name__}: {error}"

    def _add(self, cluster: ManagedCluster) -> ClusterRounds:
        with self._lock:
            if cluster.name not in self._rounds:
                serving = DeploymentRounds(self._home, self.deployments, cluster, self._log)
                self._serving[cluster.name] = serving
                self._rounds[cluster.name] = ClusterRounds(
                    self._home, self._database, self.jobs, cluster, self._log, partial(self._approve, serving)
                )
                if self._running:
                    self._start(cluster.name)
            return self._rounds[cluster.name]

    def _approve(self, serving: DeploymentRounds, attempt: Attempt) -> None:
        """Creates the deployments of the models that an attempt has approved."""
        for name in deploy_approved(self._home, self.deployments, serving, self._home.runs / attempt.id):
            self._log(f"{attempt.id}: deploys {name}")

    def _start(self, name: str) -> None:
        """Starts the two threads of a cluster. Starting Serve takes seconds, for which jobs do not wait."""
        for act in (self._advance_jobs, self._advance_deployments):
            wake = threading.Event()
            thread = threading.Thread(target=self._repeat, args=[name, act, wake], name=f"{name}", daemon=True)
            self._threads.append(thread)
            self._wakes.append(wake)
            thread.start()

    def _repeat(self, name: str, act: Callable[[str], None], wake: threading.Event) -> None:
        seconds = _REMOTE_SECONDS if self._rounds[name].cluster.store else ROUND_SECONDS
        while not self._stop.is_set():
            act(name)
            wake.wait(seconds)
            wake.clear()

    def _advance_jobs(self, name: str) -> None:
        rounds = self._rounds[name]
        if name != self._own:
            rounds.guarded("profile", lambda: rounds.renew(self._find))
        rounds.guarded("round", rounds.round)

    def _advance_deployments(self, name: str) -> None:
        serving = self._serving[name]
        try:
            serving.set_cluster(self._rounds[name].cluster)
            serving.round()
        except Exception as error:
            serving.error = f"deployments of {name}: {type(error).__name__}: {error}"
            self._log(serving.error)


def _no_cluster(name: str) -> ManagedCluster:
    raise InputError(f"unknown cluster {name!r}", f"this control plane has only {LOCAL!r}")
