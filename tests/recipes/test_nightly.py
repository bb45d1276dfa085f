"""recipes/nightly.yaml on a schedule: three ticks, each with new documents, into the deployed model."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from moray.platform.core.ports import free_port
from moray.platform.store.artifacts import Artifact, ArtifactStore
from tests.control_plane import ControlPlane, wait_for
from tests.serving_load import Load, add_model

SMALL = (
    "pretrain.steps=12", "pretrain.parallel.workers=1", "pretrain.parallel.expert_parallel=1",
    "pretrain.schedule.peak=0.003",
    "pretrain.schedule.warmup_tokens=0", "evaluate.resamples=10", "tokenize.sequence_length=64",
    "benchmark.sources=[{name: python, path: '${python:stdlib}', include: ['[p-r]*.py'], license: PSF-2.0}]",
    "benchmark-tokens.sequence_length=64", "benchmark-split.heldout=0.15", "split.heldout=0.3",
)  # fmt: skip


def arrive(incoming: Path, night: int) -> None:
    """The documents of a night, five of which were there the night before."""
    texts = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    for path in texts[night * 20 : night * 20 + 25]:
        (incoming / f"{night}-{path.name}").write_bytes(path.read_bytes())


def artifact_of(plane: ControlPlane, job: dict[str, Any], key: str) -> Artifact:
    """The artifact of a step of a job's run."""
    steps = {step["key"]: step for step in plane.client.get(f"/api/jobs/{job['id']}/run")["steps"]}
    found = ArtifactStore(plane.home).get(key, steps[key]["fingerprint"])
    assert found is not None
    return found


@pytest.fixture
def own_plane(tmp_path: Path) -> Iterator[ControlPlane]:
    plane = ControlPlane(tmp_path)
    plane.up()
    yield plane
    plane.down()


@pytest.mark.evidence
def test_three_nights(own_plane: ControlPlane, tmp_path: Path) -> None:
    plane, port = own_plane, free_port()
    store = ArtifactStore(plane.home)
    add_model(store, "aa", seed=3, alias="quickstart")
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    arrive(incoming, 0)
    chosen = [*SMALL, f"corpus.sources.0.path={incoming}"]
    plane.cli("deploy", "quickstart", "--name", "other", "--port", str(port))  # sets the port of the ingress
    plane.cli(
        "schedule",
        "add",
        "nightly",
        "nightly",
        "--every",
        "24h",
        "--catchup",
        "last",
        *(f"--set={text}" for text in chosen),
    )
    nights = []
    for night in range(3):
        arrive(incoming, night)
        plane.set_clock((night + 1) * 86_500.0)
        tick = wait_for(lambda night=night: _tick(plane, night + 1), f"tick {night + 1}")
        job = plane.wait({"id": tick["job"]}, "succeeded", seconds=600)
        approval = json.loads((artifact_of(plane, job, "deploy").folder / "approval.json").read_text())
        dedup = artifact_of(plane, job, "dedup").manifest.counts
        print(night + 1, approval["approved"], approval["why"], dedup)
        if approval["approved"]:
            wait_for(lambda approval=approval: _serves(plane, approval["model"]), "the approved model is live", 180.0)
        nights.append(approval)
        assert store.aliases.all()["nightly@approved"] == [n["model"] for n in nights if n["approved"]][-1]
        if night:
            assert dedup["in:documents"] - dedup["out:documents"] >= 25, "documents of earlier nights were kept"
    assert nights[0]["approved"]  # nothing was deployed
    values = [float(night["why"].split()[1].rstrip(",")) for night in nights]
    assert [night["approved"] for night in nights[1:]] == [values[1] <= values[0], values[2] <= min(values[:2])]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    assert client.completions.create(model="nightly", prompt="import", max_tokens=4).usage.completion_tokens > 0
    with Load(f"http://127.0.0.1:{port}/v1", "nightly") as load:
        load.wait_for_more()
    assert not load.errors


def _tick(plane: ControlPlane, number: int) -> dict[str, Any] | None:
    ticks = [one for one in plane.client.get("/api/schedules/nightly")["ticks"] if one["outcome"] == "run"]
    return ticks[0] if len(ticks) >= number else None


def _serves(plane: ControlPlane, reference: str) -> bool:
    known = {one["name"]: one for one in plane.client.get("/api/deployments")}
    if "nightly" not in known or known["nightly"]["state"] != "running":
        return False
    live = {one["version"]: one["reference"] for one in known["nightly"]["versions"]}[known["nightly"]["live"]]
    return bool(live == reference)
