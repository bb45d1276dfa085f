"""Hosts that are left out of a start of training."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moray.pipelines.pretrain.resilience.spares import room_for
from tests.checkout import ROOT


def test_a_host_holds_whole_workers() -> None:
    hosts = [{"CPU": 16.0, "GPU": 8.0}, {"CPU": 3.0, "GPU": 8.0}, {"CPU": 64.0}]
    assert room_for(hosts, {"CPU": 1, "GPU": 1}) == 8 + 3
    assert room_for(hosts, {"CPU": 0.25, "GPU": 0}) == 64 + 12 + 256
    assert room_for([{"CPU": 0.3}], {"CPU": 0.1}) == 3, "not two, by rounding"
    assert room_for([], {"CPU": 1}) == 0


PLACE = """
import sys
from ray.cluster_utils import Cluster
import ray
from ray.train import ScalingConfig
from ray.util import placement_group, placement_group_table
from moray.actors.rank_watch import start_watch
from moray.pipelines.pretrain.resilience.spares import SpareHosts

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=2).node_id for _ in range(3)]
ray.init(cluster.address)
watch = start_watch(100.0, sys.argv[1], "pretrain")
for blamed in ([], nodes[:1], nodes[:2]):
    ray.get(watch.__ray_call__.remote(lambda own, of: own._hangs.update({node: 2 for node in of}), blamed))
    spares = SpareHosts(watch)
    for workers in (2, 4, 6):
        config = ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1})
        ray.get(watch.__ray_call__.remote(lambda own: own._teams.append("another")))
        selector = spares.on_controller_start_worker_group(scaling_config=config, num_workers=workers)
        group = placement_group([{"CPU": 1}] * workers, bundle_label_selector=[selector or {}] * workers)
        ray.get(group.ready(), timeout=60)
        used = set(placement_group_table(group)["bundles_to_node_id"].values())
        print(len(blamed), workers, selector is not None, bool(used & set(blamed)), flush=True)
        ray.util.remove_placement_group(group)
        again = spares.on_controller_start_worker_group(scaling_config=config, num_workers=workers)
        assert again is None, "no team has started since, so that hosts may be in use by others"
"""


@pytest.mark.evidence
def test_a_real_cluster_leaves_the_host_out_if_the_others_have_room(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLACE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    found = {(int(blamed), int(workers)): (left == "True", used == "True") for blamed, workers, left, used in rows}
    room = {0: 6, 1: 4, 2: 2}
    for (blamed, workers), (left_out, used) in found.items():
        assert left_out == (blamed > 0 and workers <= room[blamed])
        assert used <= (not left_out)
    assert len(found) == 9
