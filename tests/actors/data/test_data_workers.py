"""Data workers as Ray actors: any of them can serve any step, and one that dies is replaced."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from moray.actors.data.batch_plan import BatchPlan
from moray.actors.data.data_worker import DataWorker, start_data_workers
from moray.platform.core.cluster import Cluster
from tests.actors.data.test_token_set import LENGTH, write

PLAN = BatchPlan((0, 3), (8, 16))


def test_a_data_worker_that_dies_is_replaced_without_a_lost_or_repeated_sequence(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    import ray

    for name in ("a", "b"):
        write(tmp_path / name, [[[i + 3] * (LENGTH + i) for i in range(40)]])
    here = DataWorker(str(tmp_path), {"a": 2.0, "b": 1.0}, 5, PLAN)
    loaders = start_data_workers(2, str(tmp_path), {"a": 2.0, "b": 1.0}, 5, PLAN)
    try:
        killed = 0
        for step in range(6):
            asked: list[Any] = [
                loaders[(step + rank) % 2].batch.remote(step, *((PLAN.size(step) * at) // 4 for at in (rank, rank + 1)))
                for rank in range(4)
            ]
            if step in (2, 4):
                victim = loaders[step // 2 % 2]
                os.kill(ray.get(victim.__ray_call__.remote(lambda worker: os.getpid())), signal.SIGKILL)
                killed += 1
            parts = [part.unpacked() for part in ray.get(asked)]
            whole = here.batch(step, 0, PLAN.size(step)).unpacked()
            np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
            np.testing.assert_array_equal(np.concatenate([part.documents for part in parts]), whole.documents)
        assert killed == 2
    finally:
        for loader in loaders:
            ray.kill(loader)
