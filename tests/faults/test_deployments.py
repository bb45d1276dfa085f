"""Deployments under faults: whatever dies while a new version rolls out under load, clients get their answers.

A client with the default retries loses no request that had not begun to answer. Without retries, only requests on
connections of a killed proxy may fail, and new connections are accepted within seconds.
"""

from __future__ import annotations

import itertools
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moray.cluster.local import short_folder
from moray.platform.core.ports import free_port
from moray.platform.core.processes import kill
from moray.platform.store.artifacts import ArtifactStore
from tests.control_plane import ControlPlane, wait_for
from tests.platform.control.test_deployments_live import deployment, serve_processes
from tests.serving_load import Load, add_model

VICTIMS = ("replica", "proxy", "serve-controller", "controller", "ray-head", "ray-worker", "supervisor")
PATIENCE = 5.0  # seconds until new connections are accepted
pytestmark = pytest.mark.evidence
_models = itertools.count()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ControlPlane, int]]:
    """A control plane whose deployment `prose` runs, and the port of its ingress."""
    plane, port = ControlPlane(tmp_path_factory.mktemp("served")), free_port()
    plane.up()
    next_model(plane)
    plane.cli("deploy", "prose", "--port", str(port))
    yield plane, port
    plane.down()
    assert plane.processes() == []


def next_model(plane: ControlPlane) -> None:
    """Points prose@newest at a model that was never there."""
    number = next(_models)
    add_model(ArtifactStore(plane.home), f"{number:02x}ab", seed=number, alias="prose")


def settled(plane: ControlPlane) -> dict:
    """The deployment, once it runs the model that its alias names."""
    target = ArtifactStore(plane.home).aliases.all()["prose@newest"]

    def look() -> dict | None:
        found = deployment(plane)
        live = next((one for one in found["versions"] if one["version"] == found["live"]), None)
        done = found["state"] == "running" and found["ready"] == 1 and live and live["reference"] == target
        return found if done and not found["reason"] else None

    return wait_for(look, "the new version is live", 180.0)


def strike(plane: ControlPlane, victim: str) -> None:
    names = {"replica": "ServeReplica", "serve-controller": "ServeController"}
    if victim in names:
        kill(serve_processes(plane, names[victim]))
    elif victim == "proxy":
        kill(serve_processes(plane, "ProxyActor")[:1])
    else:
        plane.replaced(victim, plane.kill_service(victim)) if victim != "supervisor" else kill([plane.service(victim)])


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_rollover_survives(served: tuple[ControlPlane, int], victim: str) -> None:
    plane, port = served
    with Load(f"http://127.0.0.1:{port}/v1", "prose", retries=2) as load:
        load.wait_for_more()
        next_model(plane)
        wait_for(lambda: deployment(plane)["state"] == "rolling", "the rollover has begun")
        strike(plane, victim)
        if victim == "supervisor":
            plane.cli("up")
        found = settled(plane)
        load.wait_for_more(20)
    print(f"{victim}: {dict(load.counts)}, longest {load.longest:.1f} s, {set(load.cut_errors)}")
    if victim != "ray-worker":  # the only host with replicas
        assert not load.errors, load.errors
    assert not load.counts["truncated"]
    if victim in ("replica", "controller", "serve-controller", "supervisor"):  # every proxy is alive
        assert all("the replica stopped during this response" in error for error in load.cut_errors), load.cut_errors
    assert [one["state"] for one in found["versions"]].count("live") == 1
    assert len(serve_processes(plane, "ServeReplica")) == 1


@pytest.mark.parametrize("victim", ["proxy", "ray-head"])
def test_new_connections_are_accepted_at_once(served: tuple[ControlPlane, int], victim: str) -> None:
    plane, port = served
    settled(plane)
    wait_for(lambda: len(serve_processes(plane, "ProxyActor")) == 2, "both proxies run")
    with Load(f"http://127.0.0.1:{port}/v1", "prose", clients=6) as load:
        load.wait_for_more()
        before = time.monotonic()
        if victim == "proxy":
            kill(serve_processes(plane, "ProxyActor")[:1])
        else:
            plane.kill_service("ray-head")
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() - before < PATIENCE
        accepted = time.monotonic() - before
        load.wait_for_more(60)
    broken = load.counts["failed"] + load.counts["cut"]
    print(f"{victim}: accepted after {accepted:.2f} s, {broken} broken: {load.counts} {load.errors}")
    assert broken <= load.clients  # one request on each connection
    assert not load.counts["truncated"]


@pytest.mark.parametrize("how", ["down", "power"])
def test_it_comes_back_with_the_machine(served: tuple[ControlPlane, int], how: str) -> None:
    """Nobody deploys again: Ray's folder is gone, and all ports but that of the ingress are others."""
    plane, port = served
    before = settled(plane)
    if how == "down":
        plane.down()
    else:
        kill([plane.service("supervisor")])
        kill(plane.processes())
        wait_for(lambda: not plane.processes(), "all processes have ended")
    shutil.rmtree(short_folder(plane.home), ignore_errors=True)
    for name in ("gcs", "options.json"):
        path = Path(plane.home.up / name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    plane.up()
    after = settled(plane)
    assert (after["live"], after["port"]) == (before["live"], port)
    with Load(f"http://127.0.0.1:{port}/v1", "prose") as load:
        load.wait_for_more()
    assert not load.errors + load.cut_errors


def test_a_port_that_another_program_took_is_a_reason(served: tuple[ControlPlane, int]) -> None:
    plane, port = served
    settled(plane)
    plane.down()
    with socket.create_server(("127.0.0.1", port)):
        plane.up()
        reason = f"port {port} of this machine is in use by another program"
        wait_for(lambda: reason in (found := deployment(plane))["reason"] and found["state"] == "pending", reason)
    settled(plane)
