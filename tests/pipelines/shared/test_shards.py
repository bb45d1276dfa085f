"""Progress reports of steps over shards."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from moray.pipelines.shared import shards
from moray.pipelines.shared.shards import Row, map_shards, pace
from moray.platform.core.cluster import Cluster
from moray.platform.core.errors import StepFailed
from moray.platform.plan.context import StepContext


def test_the_pace_counts_input_and_orders_reasons_by_count() -> None:
    totals = Counter({"documents": 3000, "bytes": 5_000_000, "dropped:short": 2, "dropped:long": 30, "dropped:no": 0})
    assert pace(totals, 2.0) == "1,500 documents/s, 2.5 MB/s; dropped 30 long, 2 short"
    assert pace(Counter(), 1.0) == "0 documents/s, 0.0 MB/s"


class Recorder:
    """Records the calls of a step's context."""

    def __init__(self) -> None:
        self.done: list[tuple[str, float, float]] = []
        self.logs: dict[str, str] = {}

    def progress(self, phase: str, done: float, total: float, unit: str, detail: str = "") -> None:
        self.done.append((phase, done, total))

    def write_log(self, name: str, text: str) -> None:
        self.logs[name] = text

    def log_path(self, name: str) -> str:
        return name


def halved(row: Row) -> Row:
    if row["size"] % 2:
        raise ValueError(f"{row['size']} is odd")
    return {"shard": row["shard"], "half": row["size"] // 2}


def test_few_shards_are_done_here_and_say_as_much() -> None:
    recorder: StepContext = Recorder()  # type: ignore[assignment]
    rows = [{"shard": 1, "size": 6}, {"shard": 0, "size": 4}]
    done = map_shards(recorder, "halving", rows, halved, "bytes", lambda row: row["size"], here=True)
    assert [row["half"] for row in done] == [2, 3]
    assert recorder.done == [("halving", 0, 10), ("halving", 6, 10), ("halving", 10, 10)]
    assert map_shards(recorder, "none", [], halved, "bytes", lambda row: 1) == []
    with pytest.raises(StepFailed, match="halving: ValueError: 5 is odd"):
        map_shards(recorder, "halving", [{"shard": 0, "size": 5}], halved, "bytes", lambda row: 1, here=True)
    assert "odd" in recorder.logs["traceback"]


def test_ray_data_still_has_the_interval_that_shards_shorten() -> None:
    """It is no setting of Ray's: with another name, every phase would again begin with a second of one task."""
    from ray.data._internal.execution.resource_manager import ResourceManager

    assert isinstance(vars(ResourceManager)["GLOBAL_LIMITS_UPDATE_INTERVAL_S"], int | float)


def test_a_long_shard_is_seen_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done of a shard is reported while it is worked on, never past its end, and not afterwards."""
    monkeypatch.setattr(shards, "_POLL_SECONDS", 0.001)
    seen = threading.Event()
    recorder = Recorder()

    def partly() -> float:
        if any(done == 30 for _, done, _ in recorder.done):
            seen.set()
            return 1000.0
        return 30.0

    def in_task(rows: Any, function: Any) -> Any:
        assert seen.wait(60)
        yield from map(function, rows)

    monkeypatch.setattr(shards, "_in_tasks", in_task)
    rows: list[Row] = [{"shard": 0, "size": 80}]
    ctx = cast("StepContext[Any]", recorder)
    map_shards(ctx, "halving", rows, halved, "bytes", lambda row: row["size"], partly=partly)
    assert recorder.done[0] == ("halving", 0, 80)
    assert ("halving", 30, 80) in recorder.done
    assert max(done for _, done, _ in recorder.done) == 80
    assert recorder.done[-1] == ("halving", 80, 80)


def killed(row: Row) -> Row:
    os.kill(os.getpid(), signal.SIGKILL)
    return row


def test_a_task_that_kills_its_worker_is_not_retried_indefinitely(ray_cluster: Cluster) -> None:
    """A module that crashes on import, or a library that does on one document: Ray Data tried again without an end."""
    recorder: StepContext = Recorder()  # type: ignore[assignment]
    ray_cluster.ensure()
    with pytest.raises(StepFailed, match=r"^a task ended without a result.* Worker"):
        map_shards(recorder, "halving", [{"shard": 0}], killed, "bytes", lambda row: 1)


def test_workers_look_for_no_module_in_the_current_folder(ray_cluster: Cluster) -> None:
    """A `queue.py` or `numpy.py` beside a recipe was imported by every worker."""
    import ray

    ray_cluster.ensure()
    config = ray._private.worker.global_worker.core_worker.get_job_config()
    assert str(Path.cwd()) not in config.py_driver_sys_path
    assert ray.get(ray.remote(lambda: os.environ["PYTHONSAFEPATH"]).remote()) == "1"
