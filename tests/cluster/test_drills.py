"""Hosts of our own that share nothing: a recipe that is run from a laptop gives the same files as on one machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from moray.cluster.drills.ray_cluster import RayDrill, object_store_contains, ray_drill
from moray.cluster.drills.scenarios import Fault, drawn_faults, run_recipe
from moray.platform.core.cluster import Cluster
from tests.checkout import ROOT
from tests.cluster.drill_checks import need_hosts, of_flow, prepare, prove
from tests.conftest import Flow

pytestmark = pytest.mark.ray


def test_lost_hosts_change_nothing_in_the_result(tmp_path: Path, flow: Flow) -> None:
    need_hosts()
    steps = ["corpus", "filter"]
    with ray_drill(tmp_path / "drill", 2, ROOT) as drill:
        recipe = prepare(drill, steps[-1])
        control: list[subprocess.CompletedProcess[str]] = []
        # The control run uses the time in which Ray finds out that a host is lost.
        faults = [*drawn_faults(["corpus"], 0), *drawn_faults(["filter"], 2)]
        faults.append(Fault("filter", 4.0, lambda drill, say: control.append(run_shared_path(drill))))
        shown: list[str] = []
        assert run_recipe(drill, recipe, faults, shown.append) == 0
        assert any(line.startswith("+ filter") for line in shown), shown  # the log is whole
        prove(drill, of_flow(flow, steps[-1]))
        assert control[0].returncode == 1
        assert "/mnt/work/lines does not exist" in control[0].stdout


def run_shared_path(drill: RayDrill) -> subprocess.CompletedProcess[str]:
    """Runs a recipe that names a path of the laptop as one that all hosts have, which must fail."""
    text = (drill.work / "recipe.yaml").read_text()
    shared = text.replace('path: "/mnt/work/lines"', 'path: "host:/mnt/work/lines"')
    (drill.work / "shared.yaml").write_text(shared)
    command = drill.moray("run", "/mnt/work/shared.yaml", "--cluster", "drill")
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_text_in_the_object_store_is_found(ray_cluster: Cluster) -> None:
    ray_cluster.ensure()
    marker = np.random.default_rng(0).bytes(64)
    reference = ray.put(np.frombuffer(marker * 10_000, np.uint8))
    raylets = [process.pid for process in psutil.process_iter() if process.name() == "raylet"]
    assert object_store_contains(raylets, [marker, marker[::-1]]) == [marker]
    del reference
