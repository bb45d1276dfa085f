"""The routes of deployments over a controller without a cluster: what they accept, refuse, and leave as it was."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from moray.platform.control.choices import LOCAL
from moray.platform.control.controller import Controller
from moray.platform.control.database import Database
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.core.cluster import BackendUnreachableError, Topology
from moray.platform.core.home import Home
from moray.platform.core.serving import DeploymentSeen, ServingSeen
from moray.platform.server.app import build_controller_app
from moray.platform.store.artifacts import ArtifactStore
from tests.page_server import IdleCluster
from tests.step_contexts import manifest_of


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    home = Home(tmp_path)
    store = ArtifactStore(home)
    for step, fingerprint, kind in (("export", "aa", "model"), ("export", "bb", "model"), ("tokenize", "tt", "tokens")):
        folder = store.prepare(step, fingerprint, keep_leftovers=False)
        for name in ("config.json", "tokenizer.json"):
            (folder / name).write_text("{}")
        store.commit(manifest_of(step, fingerprint, kind))
    store.aliases.set("prose", "newest", "export/aa")
    idle = ManagedCluster(LOCAL, IdleCluster(), 2, lambda: Topology(2, 0, 1 << 30))
    return Controller(home, Database(home.database, durable=False), idle)


@pytest.fixture
def http(controller: Controller, tmp_path: Path) -> Iterator[TestClient]:
    app = build_controller_app(Home(tmp_path), controller, dict, "secret")
    with TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": "Bearer secret"}) as client:
        yield client


def deploy(http: TestClient, **fields: Any) -> Any:
    return http.post("/api/deployments", json={"model": "prose", **fields})


def test_a_deployment_is_made_shown_changed_and_removed(http: TestClient, controller: Controller) -> None:
    made = deploy(http, options={"replicas": 2})
    assert (made.status_code, made.json()["name"], made.json()["model"]) == (201, "prose", "prose@newest")
    assert made.json()["versions"][0]["reference"] == "export/aa"
    assert deploy(http).status_code == 200
    assert http.get("/api/deployments/prose").json()["replicas"] == 1
    assert [row["state"] for row in http.get("/api/deployments/prose/history").json()] == ["starting"]
    assert "it is pending" in http.get("/api/deployments/prose/why").json()["lines"]
    assert deploy(http, model="export/bb", name="code").json()["model"] == "export/bb"
    assert http.post("/api/deployments/prose/rollback").status_code == 409
    assert http.delete("/api/deployments/prose").status_code == 409
    assert http.post("/api/deployments/prose/stop").json()["wanted"] == "stopped"
    controller.deployments.move("prose", "stopped")
    assert http.delete("/api/deployments/prose").status_code == 204
    assert http.get("/api/deployments/prose").status_code == 404
    assert [one["name"] for one in http.get("/api/deployments").json()] == ["code"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": ""}, "model"),
        ({"model": "prase"}, "prose@newest"),
        ({"model": "a\x00b"}, "model"),
        ({"model": "tokenize/tt", "name": "x"}, "kind 'tokens', not a model"),
        ({"model": "export/aa"}, "give it with --name"),
        ({"model": "/nowhere", "name": "x"}, "unknown artifact"),
        ({"model": "x" * 1001}, "model"),
        ({"name": "Prose"}, "invalid deployment name"),
        ({"name": "v1"}, "path of the server"),
        ({"name": "smoke-x"}, "runs use names with"),
        ({"cluster": "moon"}, "unknown cluster"),
        ({"port": 0}, "port"),
        ({"port": "8011"}, "port"),
        ({"prot": 8011}, "prot"),
        ({"options": {"replica": 2}}, "replica"),
        ({"options": {"replicas": True}}, "replicas"),
        ({"options": {"replicas": 0}}, "--replicas is 0"),
        ({"options": {"replicas": 5, "most_replicas": 2}}, "MIN..MAX"),
        ({"options": {"cpus": 1e-9}}, "--cpus 1e-09"),
        ({"options": {"cpus": 3}}, "largest machine has 2 CPU"),
        ({"options": {"replicas": 5}}, "5 replicas require 2.5 CPU"),
        ({"options": {"memory_bytes": 1 << 40}}, "of memory"),
        ({"options": {"memory_bytes": 10**30}}, "1 EB"),
        ({"options": {"target_tokens": 10**30}}, "--target-tokens"),
        ({"options": {"max_running": 10**20}}, "--max-running"),
        ({"options": {"gpus": 1}}, "leave it out"),
        ({"options": {"device": "tpu"}}, "device"),
        ({"options": 7}, "options"),
    ],
)
def test_bad_requests_change_nothing(http: TestClient, fields: dict[str, Any], said: str) -> None:
    answer = deploy(http, **fields)
    assert answer.status_code == 422, answer.text
    assert said in answer.json()["error"] + answer.json()["hint"]
    assert http.get("/api/deployments").json() == []


def test_a_deployment_of_a_cluster_that_does_not_respond(
    http: TestClient, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a replica gets a GPU is not known, so it has to be said."""

    def away() -> Topology:
        raise BackendUnreachableError("no route to host")

    cluster = dataclasses.replace(controller.serving(LOCAL).cluster, topology=away)
    controller.serving(LOCAL).set_cluster(cluster)
    assert (deploy(http).status_code, http.get("/api/deployments").json()) == (503, [])
    for gpus in (0, 1):
        made = deploy(http, name=f"prose-{gpus}", options={"gpus": gpus}).json()
        assert made["versions"][0]["resources"].get("num_gpus", 0) == gpus
    assert http.delete("/api/deployments/prose-0?force=true").status_code == 409  # it has not been tried yet
    controller.serving(LOCAL).error = "no route to host"
    assert http.delete("/api/deployments/prose-0").status_code == 409
    assert http.delete("/api/deployments/prose-0?force=true").status_code == 204


def test_a_rollback_to_a_model_that_is_gone_is_refused(http: TestClient, tmp_path: Path) -> None:
    deploy(http)
    deploy(http, options={"max_running": 1})
    shutil.rmtree(Path(http.get("/api/deployments/prose").json()["versions"][0]["folder"]))
    refused = http.post("/api/deployments/prose/rollback", json={"to": 1})
    assert (refused.status_code, "is gone" in refused.json()["error"]) == (409, True)


@pytest.mark.parametrize("model", ["/" + "a" * 300, "~nobody/x", "/root/\x7f"])
def test_a_path_that_cannot_be_read_is_bad_input(http: TestClient, model: str) -> None:
    assert deploy(http, model=model, name="x").status_code == 422


def test_unknown_names_and_methods(http: TestClient) -> None:
    for method, path in (("GET", ""), ("GET", "/history"), ("GET", "/why"), ("POST", "/stop"), ("DELETE", "")):
        assert http.request(method, f"/api/deployments/none{path}").status_code == 404
    assert http.post("/api/deployments/none/rollback", json={"to": 1}).status_code == 404
    deploy(http)
    for body in ({"to": 0}, {"to": "one"}, {"version": 1}):
        assert http.post("/api/deployments/prose/rollback", json=body).status_code == 422
    assert http.post("/api/deployments/prose/rollback", json={"to": 9}).status_code == 409
    assert http.put("/api/deployments").status_code == 405


def test_a_model_is_tried_where_it_is_served(http: TestClient, controller: Controller) -> None:
    deploy(http)
    asked = http.post("/api/deployments/prose/completions", json={"prompt": "x"})
    assert (asked.status_code, "is pending" in asked.json()["error"]) == (503, True)
    serving = controller.serving(LOCAL)
    assert serving is not None
    serving.seen = ServingSeen("127.0.0.1", 1, ("127.0.0.1",), {"prose": DeploymentSeen("running")})
    assert http.get("/api/deployments/prose").json()["urls"] == ["http://127.0.0.1:1/v1"]
    asked = http.post("/api/deployments/prose/completions", json={"prompt": "x"})
    assert (asked.status_code, "does not answer" in asked.json()["error"]) == (503, True)
