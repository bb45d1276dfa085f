"""Attempts whose files are in a store, clusters that are away, and a queue of ten thousand jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from moray.platform.control import cluster_rounds, reconcile
from moray.platform.control.attempt import AttemptOrder, Outcome, StoredFiles
from moray.platform.control.choices import LOCAL
from moray.platform.control.controller import Controller
from moray.platform.control.database import Database
from moray.platform.control.jobs import Submission
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.control.queue import choose_jobs
from moray.platform.core.cluster import BackendUnreachableError, ClusterBackend, Observed, Topology, Usage
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.server.overview import Overview
from moray.platform.store.paths import StorePath, bucket_at
from tests.s3 import BUCKET, Request, faulty_proxy

ORDER = AttemptOrder(
    source="name: x", path="r.yaml", folder="/", overrides=(), address="", cpus=1, gpus=0, memory_bytes=1, ordered=0.0,
    boot="", cluster="lab",
)  # fmt: skip


class Cluster(ClusterBackend):
    """A cluster that remembers what it was told. It may be away."""

    def __init__(self) -> None:
        self.away = False
        self.store = ""
        self.submitted: list[str] = []
        self.jobs: dict[str, Observed] = {}
        self.forgotten: list[str] = []

    def submit(self, attempt: str, environment: Mapping[str, str]) -> None:
        self._reach()
        self.submitted.append(attempt)
        self.jobs[attempt] = Observed("running")

    def observe(self) -> Mapping[str, Observed]:
        self._reach()
        return dict(self.jobs)

    def stop(self, attempt: str) -> None:
        self._reach()

    def forget(self, attempt: str) -> None:
        self.forgotten.append(attempt)

    def usage(self) -> Usage:
        self._reach()
        return Usage(1, 0, 0, 0, 1)

    def _reach(self) -> None:
        if self.away:
            raise BackendUnreachableError("the dashboard does not respond")


@pytest.fixture
def plane(home: Home, tmp_path: Path) -> Iterator[tuple[Controller, Cluster, Database]]:
    """A controller with a local cluster, and one called lab that exists only from its first use."""
    lab = Cluster()

    def find(name: str) -> ManagedCluster:
        if name != "lab":
            raise InputError(f"unknown cluster {name!r}", "moray cluster list")
        return ManagedCluster("lab", lab, 2, lambda: Topology(1, 0, 1), where="http://lab:8265", store=lab.store)

    database = Database(home.database, durable=False)
    local = ManagedCluster(LOCAL, Cluster(), 1, lambda: Topology(1, 0, 1))
    yield Controller(home, database, local, find, lambda text: None), lab, database
    database.close()


def submission(tmp_path: Path, cluster: str) -> Submission:
    (tmp_path / "text").mkdir(exist_ok=True)
    (tmp_path / "text" / "a.txt").write_text("a few words")
    recipe = f"name: tiny\nsteps: {{corpus: {{with: {{sources: [{{name: a, path: {tmp_path}/text}}]}}}}}}"
    return Submission(source=recipe, folder=str(tmp_path), cluster=cluster)


def test_each_cluster_has_its_own_slots_and_an_absent_one_holds_up_no_other(
    plane: tuple[Controller, Cluster, Database], tmp_path: Path
) -> None:
    controller, lab, _ = plane
    lab.away = True
    there = [controller.jobs.submit(submission(tmp_path, "lab"))[0].id for _ in range(3)]
    here = controller.jobs.submit(submission(tmp_path, LOCAL))[0].id
    controller.round()
    assert controller.jobs.get(here).state == "starting"
    assert [controller.jobs.get(name).state for name in there] == ["queued"] * 3
    assert any("the dashboard does not respond" in line for line in controller.why(controller.jobs.get(there[0])))
    lab.away = False
    controller.round()
    assert [controller.jobs.get(name).state for name in there] == ["starting", "starting", "queued"]
    assert lab.submitted == [f"{name}.1" for name in there[:2]]


def test_a_job_of_an_unknown_cluster_waits_with_the_reason(
    plane: tuple[Controller, Cluster, Database], tmp_path: Path
) -> None:
    controller, _, _ = plane
    with pytest.raises(InputError, match="unknown cluster 'gone'"):
        controller.cluster("gone")
    job = controller.jobs.submit(submission(tmp_path, "gone"))[0]  # its profile was removed after the submission
    controller.round()
    assert controller.why(controller.jobs.get(job.id)) == ["waiting for cluster 'gone': unknown cluster 'gone'"]


def test_a_job_that_misses_its_deadline_is_cancelled_once(
    plane: tuple[Controller, Cluster, Database], tmp_path: Path
) -> None:
    controller, lab, _ = plane
    lab.away = True
    late = controller.jobs.submit(submission(tmp_path, "lab"), expires=time.time() - 1)[0]
    timely = controller.jobs.submit(submission(tmp_path, "lab"), expires=time.time() + 3600)[0]
    controller.round()
    found = controller.jobs.get(late.id)
    assert (found.state, found.reason) == ("cancelled", "missed: it did not start on cluster 'lab' by its deadline")
    assert controller.jobs.get(timely.id).state == "queued"
    lab.away = False
    controller.round()
    controller.round()
    assert controller.jobs.get(timely.id).state == "starting"


def test_an_ended_driver_whose_store_refuses_writes_fails_with_the_reason(
    plane: tuple[Controller, Cluster, Database], tmp_path: Path, s3: Any, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller, lab, _ = plane
    refuses: list[bool] = []

    def fault(request: Request) -> str | tuple[int, str]:
        return (507, "<Error><Code>XMinioStorageFull</Code></Error>") if refuses and request.method == "PUT" else "pass"

    with faulty_proxy(s3_url, fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        bucket_at.cache_clear()
        lab.store = f"s3://{BUCKET}/full"
        job = controller.jobs.submit(submission(tmp_path, "lab"))[0]
        controller.round()
        refuses.append(True)
        lab.jobs[f"{job.id}.1"] = Observed("failed", "exit code 1")
        monkeypatch.setattr(reconcile, "SILENT_SECONDS", 0.0)
        controller.round()
        assert controller.jobs.get(job.id).state == "starting"
        assert "the store is full" in controller.clusters()["lab"].error
        monkeypatch.setattr(cluster_rounds, "_REFUSED_SECONDS", 0.0)
        controller.round()
    found = controller.jobs.get(job.id)
    assert (found.state, [attempt.state for attempt in found.attempts]) == ("failed", ["failed"])
    assert f"s3://{BUCKET}/full/runs/{job.id}.1/outcome.json: the store is full" in found.reason
    bucket_at.cache_clear()


def test_a_profile_that_changed_is_used_by_a_running_controller(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token or key that expires must not end the jobs of a control plane that runs for weeks."""
    found = [ManagedCluster("lab", Cluster(), 2, lambda: Topology(1, 0, 1), version="old")]
    database = Database(home.database, durable=False)
    local = ManagedCluster(LOCAL, Cluster(), 1, lambda: Topology(1, 0, 1))
    controller = Controller(home, database, local, lambda name: found[0], lambda text: None)
    rounds = controller.cluster("lab")
    monkeypatch.setattr(cluster_rounds, "_RENEWAL_SECONDS", 0.0)
    rounds.renew(lambda name: found[0])
    assert rounds.cluster.version == "old"
    rounds._renewal_due = 0.0
    found[0] = ManagedCluster("lab", Cluster(), 5, lambda: Topology(1, 0, 1), version="new")
    rounds.renew(lambda name: found[0])
    assert (rounds.cluster.version, rounds.cluster.slots) == ("new", 5)
    database.close()


def test_an_unexpected_error_of_a_profile_does_not_end_the_controller(home: Home, tmp_path: Path) -> None:
    def find(name: str) -> ManagedCluster:
        raise PermissionError(13, "no access")

    database = Database(home.database, durable=False)
    local = ManagedCluster(LOCAL, Cluster(), 1, lambda: Topology(1, 0, 1))
    controller = Controller(home, database, local, find, lambda text: None)
    job = controller.jobs.submit(submission(tmp_path, "lab"))[0]
    controller.round()
    assert "no access" in controller.why(controller.jobs.get(job.id))[0]
    database.close()


@pytest.mark.parametrize("is_home", [False, True])
def test_runs_of_a_folder_store_are_linked_once(home: Home, tmp_path: Path, is_home: bool) -> None:
    """Also after a controller that was killed before the order was written, and if the runs are in the store anyway."""
    home = Home(home.root, str(tmp_path / "store")) if is_home else home
    store = home.runs.parent if is_home else tmp_path / "store"
    cluster = ManagedCluster("lab", Cluster(), 1, lambda: Topology(1, 0, 1), store=str(store))
    for _ in range(2):
        cluster.files(home, "job.1")
    cluster.files(home, "job.1").write_order(ORDER)
    assert cluster.files(home, "job.1").read_order() == ORDER
    assert (home.runs / "job.1" / "attempt.json").exists()


def test_jobs_of_others_on_a_shared_cluster_are_left_alone(
    plane: tuple[Controller, Cluster, Database], tmp_path: Path
) -> None:
    controller, lab, _ = plane
    lab.jobs = {"raysubmit_theirs": Observed("running"), "another-controller.1": Observed("succeeded")}
    controller.jobs.submit(submission(tmp_path, "lab"))
    controller.round()
    controller.round()
    assert not lab.forgotten


def test_ten_thousand_jobs_are_decided_quickly_and_shown_briefly(
    plane: tuple[Controller, Cluster, Database], home: Home, tmp_path: Path
) -> None:
    controller, _, database = plane
    job = controller.jobs.submit(submission(tmp_path, LOCAL))[0]
    with database.write() as connection:
        columns = [row["name"] for row in connection.execute("PRAGMA table_info(jobs)")]
        copied = ", ".join(f"'j' || n || '-' || {name}" if name in ("id", "name") else name for name in columns)
        connection.execute(
            f"WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 9999) "
            f"INSERT INTO jobs ({', '.join(columns)}) SELECT {copied} FROM jobs, numbers WHERE id = ?",
            (job.id,),
        )
    jobs = controller.jobs.open()
    assert len(jobs) == 10_000
    assert [one.id for one in choose_jobs(jobs, 1, time.time())] == [controller.jobs.queue(1)[0].id]
    shown = Overview(home, controller)()
    assert (shown["waiting"], shown["active"], len(shown["queued"])) == (10_000, 0, 30)
    assert len(json.dumps(shown)) < 50_000


@pytest.fixture
def stored(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoredFiles]:
    monkeypatch.setenv("MORAY_HOME", str(tmp_path / "host"))
    bucket_at.cache_clear()
    yield StoredFiles(StorePath(f"s3://{BUCKET}/root", "runs/job.1"), tmp_path / "controller" / "job.1")
    bucket_at.cache_clear()


def other_host(tmp_path: Path) -> StoredFiles:
    """The same attempt, as its driver sees it."""
    return StoredFiles(StorePath(f"s3://{BUCKET}/root", "runs/job.1"), tmp_path / "driver" / "job.1")


def test_order_lease_and_outcome_of_a_stored_attempt(stored: StoredFiles, tmp_path: Path) -> None:
    driver = other_host(tmp_path)
    assert driver.read_order() is None
    assert not stored.is_alive()
    stored.write_order(ORDER)
    assert driver.read_order() == ORDER
    lease = driver.lease()
    assert lease.acquire()
    assert stored.is_alive()
    assert not other_host(tmp_path).lease().acquire()
    assert stored.read_outcome() is None
    assert driver.record_outcome(Outcome(state="succeeded"))
    lease.release()
    assert not stored.is_alive()
    assert stored.read_outcome() == Outcome(state="succeeded")
    assert not stored.record_outcome(Outcome(state="cancelled", detail="lost"))
    assert (tmp_path / "controller" / "job.1" / "outcome.json").exists()


def test_an_attempt_that_was_given_up_cannot_succeed_later(stored: StoredFiles, tmp_path: Path) -> None:
    assert stored.record_outcome(Outcome(state="cancelled", detail="lost"))
    assert not other_host(tmp_path).record_outcome(Outcome(state="succeeded"))
    assert other_host(tmp_path).read_outcome() == Outcome(state="cancelled", detail="lost")
