"""Usage of the cluster, computed from Ray's cluster state: dead nodes do not count."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from ray.core.generated.autoscaler_pb2 import ClusterResourceState, NodeState, NodeStatus

from moray.cluster.pending import machines_in
from moray.cluster.usage_log import read_usage, usage_file, usage_in
from moray.platform.cli.up_commands import show_overview
from moray.platform.core.atomic import write_json
from moray.platform.core.cluster import Usage
from moray.platform.core.home import Home

RESOURCES = {"CPU": 2.0, "GPU": 1.0}


def state(*statuses: int) -> ClusterResourceState:
    """A cluster with a node per status, each with two CPUs and a GPU of which one CPU is free."""
    nodes = [NodeState(status=one, total_resources=RESOURCES, available_resources={"CPU": 1.0}) for one in statuses]
    return ClusterResourceState(node_states=nodes)


def test_dead_nodes_are_not_counted() -> None:
    found = state(NodeStatus.RUNNING, NodeStatus.DEAD, NodeStatus.IDLE, NodeStatus.DRAINING, NodeStatus.DEAD)
    assert usage_in(found) == Usage(6.0, 3.0, 3.0, 3.0, nodes=3, dead_nodes=2)
    assert len(machines_in(found)) == 3


def test_a_cluster_of_dead_nodes_has_nothing() -> None:
    assert usage_in(state(NodeStatus.DEAD)) == Usage(0.0, 0.0, 0.0, 0.0, nodes=0, dead_nodes=1)


def test_usage_survives_the_file_with_and_without_dead_nodes(home: Home) -> None:
    usage = usage_in(state(NodeStatus.RUNNING, NodeStatus.DEAD))
    write_json(usage_file(home), asdict(usage))
    assert read_usage(home) == usage
    earlier = {name: value for name, value in asdict(usage).items() if name != "dead_nodes"}
    write_json(usage_file(home), earlier)
    assert read_usage(home).dead_nodes == 0


@pytest.mark.parametrize(("dead", "shown"), [(0, "2 nodes, 1 of 2 CPU"), (3, "2 nodes (3 dead), 1 of 2 CPU")])
def test_status_shows_dead_nodes_apart(dead: int, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    usage = Usage(cpus=2.0, cpus_used=1.0, gpus=0.0, gpus_used=0.0, nodes=2, dead_nodes=dead)
    cluster = {"alive": True, **asdict(usage), "memory_bytes": 8 << 30, "memory_used_bytes": 1 << 30, "detail": ""}
    overview = {
        "services": [],
        "cluster": cluster,
        "queued": [],
        "running": [],
        "slots": 1,
        "clusters": [],
        "active": 0,
        "waiting": 0,
    }
    assert show_overview(json.loads(json.dumps(overview)), json_=False) == 0
    assert shown in capsys.readouterr().out
