"""Deployments as people use them, on the shared `moray up`: deploy, ask, roll over under load, stop."""

from __future__ import annotations

import json

import openai
import psutil

from moray.platform.core.ports import free_port
from moray.platform.core.processes import Process, marked
from moray.platform.store.artifacts import ArtifactStore
from tests.control_plane import ControlPlane, wait_for
from tests.serving_load import Load, add_model


def serve_processes(plane: ControlPlane, *names: str) -> list[Process]:
    """The processes of Ray Serve on the cluster, by the beginning of their titles."""
    titles = tuple(f"ray::{name}" for name in names or ("Serve", "Proxy"))
    found = (p for service in ("ray-head", "ray-worker") for p in marked(plane.home.root, service))
    return [process for process in found if _title(process).startswith(titles)]


def _title(process: Process) -> str:
    try:
        return (psutil.Process(process.pid).cmdline() or [""])[0]
    except psutil.Error:
        return ""


def test_a_deployment_from_its_first_answer_to_its_end(plane: ControlPlane) -> None:
    store, port = ArtifactStore(plane.home), free_port()
    add_model(store, "aa", seed=3, alias="prose")
    add_model(store, "bb", seed=4)
    done = plane.cli("deploy", "prose", "--port", str(port))
    url = f"http://127.0.0.1:{port}/v1"
    assert f"prose: running, version 1 at {url}" in done.stdout
    assert "refused" not in done.stderr
    with Load(url, "prose") as load:
        load.wait_for_more()
        store.aliases.set("prose", "newest", "export/bb")
        wait_for(lambda: (found := deployment(plane))["live"] == 2 and found["state"] == "running", "version 2 is live")
        load.wait_for_more()
    assert not load.errors + load.cut_errors, load.errors + load.cut_errors
    assert not load.counts["truncated"]
    plane.cli("deploy", "export/aa", "--name", "other")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["other", "prose"]
    answers = {
        name: client.completions.create(model=name, prompt="In the", max_tokens=8, temperature=0).choices[0].text
        for name in ("other", "prose")
    }
    assert answers["other"] != answers["prose"]
    listed = {row["name"]: row for row in json.loads(plane.cli("deployments", "list", "--json").stdout)}
    assert {name: (row["state"], row["ready"], row["urls"]) for name, row in listed.items()} == {
        "other": ("running", 1, [url]),
        "prose": ("running", 1, [url]),
    }
    wait_for(lambda: deployment(plane)["served"]["requests"] > load.answered, "the requests are counted")
    for name in listed:
        assert "stopped" in plane.cli("deployments", "stop", name).stdout
    assert not serve_processes(plane)
    said = [(row["version"], row["state"]) for row in plane.client.get("/api/deployments/prose/history")]
    assert (
        said.index((1, "live")) < said.index((2, "live")) < said.index((1, "replaced")) < said.index((None, "stopped"))
    )
    assert said.count((2, "live")) == 1
    for name in listed:
        plane.cli("deployments", "rm", name)


def deployment(plane: ControlPlane, name: str = "prose") -> dict:
    return dict(plane.client.get(f"/api/deployments/{name}"))
