"""A deployment on a cluster of several hosts: Moray is not installed on them, and its model is in a bucket."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import requests

from moray.cluster.drills.ray_cluster import KEYS, RayDrill, ray_drill
from moray.cluster.drills.scenarios import lose_head_and_state
from moray.platform.core.home import Home
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.paths import set_store_variables
from tests.checkout import ROOT
from tests.cluster.drill_checks import need_hosts
from tests.control_plane import wait_for
from tests.serving_load import Load, add_model

pytestmark = [pytest.mark.ray, pytest.mark.evidence]


@pytest.fixture(autouse=True)
def hosts() -> None:
    need_hosts()


def moray(drill: RayDrill, *arguments: str) -> str:
    done = subprocess.run(drill.moray(*arguments), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    return done.stdout


def deployment(drill: RayDrill) -> dict:
    return dict(json.loads(moray(drill, "deployments", "status", "prose", "--json")))


def settle(drill: RayDrill, reference: str, ready: int = 2) -> dict:
    def look() -> dict | None:
        found = deployment(drill)
        live = {one["version"]: one["reference"] for one in found["versions"]}.get(found["live"])
        return found if (found["state"], found["ready"], live) == ("running", ready, reference) else None

    return wait_for(look, f"{reference} runs", 180.0)


def test_a_deployment_outlives_the_laptop_a_host_and_the_head(tmp_path: Path) -> None:
    with ray_drill(tmp_path / "drill", 2, ROOT) as drill:
        set_store_variables(drill.root, {**KEYS, "AWS_ENDPOINT_URL": drill.endpoint})
        store = ArtifactStore(Home(tmp_path / "uploader", drill.root))
        add_model(store, "aa", seed=3, alias="prose")
        add_model(store, "bb", seed=4)
        moray(drill, "up", "--cpus", "1")
        refused = subprocess.run(
            drill.moray("deploy", "prose", "--cluster", "drill"),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert refused.returncode == 2
        assert "moray keys add" in refused.stderr  # its hosts listen on all addresses
        key = json.loads(moray(drill, "keys", "add", "load", "--json"))["key"]
        said = moray(drill, "deploy", "prose", "--cluster", "drill", "--replicas", "2")
        print(said)
        found = settle(drill, "export/aa")
        assert {f"http://{node.address}:8000/v1" for node in drill.nodes} <= set(found["urls"])
        first, second = (f"http://{node.address}:8000/v1" for node in drill.nodes)
        with Load(first, "prose", key=key) as load:
            load.wait_for_more()
            store.aliases.set("prose", "newest", "export/bb")
            settle(drill, "export/bb")
            load.wait_for_more()
        assert not load.errors + load.cut_errors, load.errors + load.cut_errors
        wait_for(lambda: deployment(drill)["served"]["requests"] >= load.answered, "the requests are counted")
        with Load(second, "prose", retries=2, key=key) as load:
            load.wait_for_more()
            drill.network.cut_power(drill.laptop)
            load.wait_for_more()
            drill.network.cut_power(drill.nodes[0])
            load.wait_for_more(20)
            drill.network.power_on(drill.laptop)
            drill.reboot(drill.nodes[0])
            moray(drill, "up")
            settle(drill, "export/bb")
            load.wait_for_more()
        print(load.counts, set(load.errors + load.cut_errors), f"longest {load.longest:.1f} s")
        assert not load.errors, load.errors
        lose_head_and_state(drill, print)
        wait_for(lambda: answers(second, key), "the model answers again", 180.0)
        settle(drill, "export/bb")
        with Load(second, "prose", key=key) as load:
            load.wait_for_more()
        assert not load.errors + load.cut_errors
        moray(drill, "deployments", "stop", "prose")
        left = [pid for node in (drill.head, *drill.nodes) for pid in node.pids() if b"ray::Serve" in title(pid)]
        assert not left


def answers(url: str, key: str) -> bool:
    body = {"model": "prose", "prompt": "In the", "max_tokens": 1}
    headers = {"Authorization": f"Bearer {key}"}
    try:
        return requests.post(f"{url}/completions", json=body, headers=headers, timeout=5).status_code == 200
    except requests.RequestException:
        return False


def title(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
