"""Requests that Ray cannot place are reported once, with the missing resources."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moray.cluster.pending import Demand, Machine, PendingReport, PendingWatcher
from moray.platform.core.cluster import Cluster, Topology
from moray.platform.core.errors import InputError
from moray.platform.core.events import Event, NoteEvent
from moray.platform.core.home import Home
from moray.platform.core.ports import free_port
from moray.platform.plan.context import StepContext
from moray.platform.run.runner import Runner
from tests.conftest import Flow, SharedCluster
from tests.platform.run.test_runner import Write, recipe
from tests.small_run import run_small

TWO = Machine({"CPU": 2.0, "memory": 8e9}, {"memory": 8e9})  # a node without an entry has nothing free of it


def task(**resources: float) -> Demand:
    return Demand((tuple(sorted(resources.items())),))


def test_an_unsatisfiable_demand_is_reported_once_and_immediately() -> None:
    report = PendingReport(15.0)
    ((text, unsatisfiable),) = report.update(0.0, {task(CPU=64.0): 3}, [TWO])
    assert unsatisfiable
    assert text == "cannot be scheduled: it needs 64 CPU, but the cluster has 2 CPU; request less or add machines"
    assert report.update(1.0, {task(CPU=64.0): 3}, [TWO]) == []
    ((text, _),) = report.update(2.0, {task(GPU=1.0): 1}, [TWO])
    assert "it needs 1 GPU, but the cluster has 0 GPU" in text


def test_sums_of_fractions_that_fit_are_no_demand_that_can_never_start() -> None:
    """15 times 0.4 is 6.000000000000001."""
    six = Machine({"CPU": 6.0}, {})
    for workers, share in ((15, 0.4), (60, 0.1), (9, 0.6666)):
        assert PendingReport(15.0).update(0.0, {Demand(((("CPU", share),),) * workers): 1}, [six]) == []
    ((text, unsatisfiable),) = PendingReport(15.0).update(0.0, {Demand(((("CPU", 0.4001),),) * 15): 1}, [six])
    assert unsatisfiable
    assert "it needs 6.0015 CPU" in text


def test_machines_count_one_by_one_unless_a_group_may_spread() -> None:
    machines = [TWO, TWO]
    ((text, _),) = PendingReport(15.0).update(0.0, {task(CPU=3.0): 1}, machines)
    assert "it needs 3 CPU on one machine, but the largest has 2 CPU" in text
    bundle = (("CPU", 1.0),)
    assert PendingReport(15.0).update(0.0, {Demand((bundle,) * 4): 1}, machines) == []
    assert PendingReport(15.0).update(0.0, {Demand((bundle,) * 5): 1}, machines) != []
    assert PendingReport(15.0).update(0.0, {Demand((bundle,) * 3, together=True): 1}, machines) != []


def test_a_waiting_demand_is_reported_after_a_delay_unless_its_count_falls() -> None:
    report = PendingReport(15.0)
    for now, count in ((0.0, 9), (10.0, 9), (14.0, 8), (28.0, 8)):
        assert report.update(now, {task(CPU=1.0): count}, [TWO]) == []
    assert report.update(29.0, {task(CPU=1.0): 8}, [TWO]) == [("waiting for 1 CPU: 2 of 2 CPU in use", False)]
    assert report.update(60.0, {task(CPU=1.0): 8}, [TWO]) == []
    report = PendingReport(15.0)
    assert report.update(0.0, {task(memory=9e8): 1}, [TWO]) == []
    assert report.update(5.0, {}, [TWO]) == []
    assert report.update(16.0, {task(memory=9e8): 1}, [TWO]) == [], "it was placed in between"
    ((text, _),) = report.update(31.0, {task(memory=9e8): 1}, [TWO])
    assert text == "waiting for 900 MB memory: 0 B of 8 GB memory in use"


def test_a_cluster_without_machines_reports_nothing() -> None:
    report = PendingReport(15.0)
    assert report.update(0.0, {task(CPU=1.0): 1}, []) == []
    assert report.update(60.0, {task(CPU=1.0): 1}, [TWO]) != []


class Watched(SharedCluster):
    """The shared cluster with a watcher of its own, as the embedded one has it."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology)
        self._watcher = PendingWatcher(self.report_pending, patience=1.0)

    def ensure(self) -> Topology:
        self._watcher.start()
        return self.topology()

    def stop(self) -> None:
        self._watcher.stop()


class OnRay(Write):
    needs_ray = True


@contextmanager
def watching(wanted: str) -> Iterator[tuple[list[str], threading.Event]]:
    """Notes about requests for `wanted`. (The cluster may still list a request of an earlier test.)"""
    notes: list[str] = []
    heard = threading.Event()

    def note(text: str, unsatisfiable: bool) -> None:
        if wanted in text:
            notes.append(text)
            heard.set()

    watcher = PendingWatcher(note, patience=1.0)
    watcher.start()
    try:
        yield notes, heard
    finally:
        watcher.stop()


def test_a_step_that_asks_for_too_much_warns_the_user(ray_cluster: Cluster, home: Home) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    seen: list[Event] = []
    heard = threading.Event()

    def listen(event: Event) -> None:
        seen.append(event)
        if isinstance(event, NoteEvent):
            heard.set()

    def ask(ctx: StepContext[Any]) -> None:
        group = placement_group([{"CPU": 64}])
        task = ray.remote(num_cpus=1)(lambda: 1).options(placement_group=group).remote()
        assert heard.wait(60)
        ray.cancel(task, force=True)
        remove_placement_group(group)

    made = recipe("a", during=ask)
    step = OnRay(ask)
    planned = made.steps[0].__class__("s0", step, made.steps[0].config, {})
    Runner(home, Watched(ray_cluster.topology()), [listen]).run(
        made.__class__("chain", Path("chain.yaml"), (planned,), "name: chain\n")
    )
    notes = [(event.step, event.level, event.text) for event in seen if isinstance(event, NoteEvent)]
    assert notes == [
        (
            "s0",
            "warning",
            "cannot be scheduled: it needs 64 CPU, but the cluster has 2 CPU; request less or add machines",
        )
    ]


class Alone(Watched):
    """As the embedded cluster: no machine joins."""

    fixed = True


def test_an_unsatisfiable_demand_is_an_error_on_an_embedded_cluster(ray_cluster: Cluster, home: Home) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    def ask(ctx: StepContext[Any]) -> None:
        group = placement_group([{"CPU": 1}, {"CPU": 1.0001}])
        try:
            ray.get(ray.remote(num_cpus=1)(lambda: 1).options(placement_group=group).remote())
        finally:
            remove_placement_group(group)

    made = recipe("a", during=ask)
    planned = made.steps[0].__class__("s0", OnRay(ask), made.steps[0].config, {})
    wanted = made.__class__("chain", Path("chain.yaml"), (planned,), "name: chain\n")
    with pytest.raises(
        InputError, match=r"step 's0': cannot be scheduled: it needs 2\.0001 CPU, but the cluster has 2"
    ):
        Runner(home, Alone(ray_cluster.topology())).run(wanted)


def test_training_that_can_never_start_is_an_error_too(flow: Flow) -> None:
    """Ray Train waits for its workers in the main thread, under a handler of its own if it may."""
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    larger = Alone(Topology(8, 0, flow.cluster.topology().memory_bytes))
    overrides = [
        "pretrain.parallel.workers=4",
        "pretrain.parallel.expert_parallel=1",
        "pretrain.steps=3",
        "pretrain.batch_sequences=8",
    ]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(InputError, match="step 'pretrain': cannot be scheduled: it needs 4 CPU, but the cluster has 2"):
        run_small(flow.home, flow.folder, larger, overrides)
    assert signal.getsignal(signal.SIGINT) is before
    # What was waited for ends with the driver, which here goes on.
    for number, group in ray.util.placement_group_table().items():
        if group["state"] == "PENDING":
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(number)))


def test_a_replica_that_cannot_be_placed_is_reported(ray_cluster: Cluster, tmp_path: Path) -> None:
    """Other work holds both CPUs while a model is to be served; when that ends, the deployment goes on."""
    import ray

    from moray.pipelines.serve.session import open_session
    from moray.platform.core.serve_options import ServeOptions

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="a replica requires 64 CPU, and the cluster's largest machine has 2"):
        open_session(tmp_path, "m", options=ServeOptions(cpus=64))
    hog = ray.remote(num_cpus=2)(type("Hog", (), {"ready": lambda self: True})).remote()
    assert ray.get(hog.ready.remote())
    ended: list[BaseException] = []

    def serve() -> None:
        try:
            open_session(tmp_path, "m", port=free_port())
        except InputError as error:  # a model of two empty files, once there is room to look at it
            ended.append(error)

    thread = threading.Thread(target=serve)
    with watching("0.5 CPU") as (notes, heard):
        thread.start()
        assert heard.wait(60)
        ray.kill(hog)
        thread.join()
    assert notes[0] == "waiting for 0.5 CPU: 2 of 2 CPU in use"
    assert len(ended) == 1
