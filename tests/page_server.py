"""A controller's HTTP side over real data: jobs in several states with their events, schedules with ticks, deployments
with what their replicas report, and a tiny server in the place of a model."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import uvicorn

from moray.platform.control.auth import ensure_token
from moray.platform.control.choices import LOCAL
from moray.platform.control.controller import Controller
from moray.platform.control.database import Database
from moray.platform.control.deployments import NewDeployment
from moray.platform.control.jobs import Job, Submission
from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.control.schedules import NewSchedule
from moray.platform.core.cluster import ClusterBackend, Host, Observed, Topology, Usage
from moray.platform.core.events import (
    Event,
    EventLog,
    MetricEvent,
    NoteEvent,
    ProgressEvent,
    RunEvent,
    ServingEvent,
    StepEvent,
)
from moray.platform.core.home import Home
from moray.platform.core.serve_options import ServeOptions
from moray.platform.core.serving import DeploymentSeen, ReplicaSeen, ServingSeen
from moray.platform.server.app import build_controller_app
from moray.platform.server.overview import Overview

RECIPE = """
name: prose
steps:
  corpus: {with: {sources: [{name: here, path: ".", include: ["*.txt"], license: none}]}}
  filter: {inputs: {documents: corpus}}
  dedup: {inputs: {documents: filter}}
  split: {inputs: {documents: dedup}}
  tokenizer: {inputs: {documents: split}}
  tokenize: {inputs: {documents: split, tokenizer: tokenizer}}
  pretrain:
    inputs: {tokens: tokenize}
    with: {steps: 200, batch_sequences: 16, schedule: {peak: 3.0e-3}, model: {preset: tiny}}
  export: {inputs: {checkpoint: pretrain, tokenizer: tokenizer}}
"""


class IdleCluster(ClusterBackend):
    """A cluster with two cores on which nothing was started: the controller's loop does not run here."""

    def submit(self, attempt: str, environment: Mapping[str, str]) -> None:
        raise AssertionError("nothing is started here")

    def observe(self) -> Mapping[str, Observed]:
        return {}

    def stop(self, attempt: str) -> None:
        raise AssertionError("nothing is stopped here")

    def forget(self, attempt: str) -> None:
        raise AssertionError("nothing is forgotten here")

    def usage(self) -> Usage:
        return Usage(cpus=2.0, cpus_used=1.0, gpus=0.0, gpus_used=0.0, nodes=2, dead_nodes=1)


class LabCluster(IdleCluster):
    """A cluster of a head and 30 hosts, one of them dead, where the driver of one attempt runs."""

    def __init__(self) -> None:
        self.attempt = "another-job.1"

    def observe(self) -> Mapping[str, Observed]:
        return {self.attempt: Observed("running", host="10.0.0.7")}

    def usage(self) -> Usage:
        nodes = [Host(f"10.0.0.{n}", n != 9, cpus=8.0, cpus_used=5.0, id=f"node-{n}") for n in range(2, 32)]
        hosts = (Host("10.0.0.1", True, head=True, id="node-1"), *nodes)
        waiting = ("3 x 1 CPU and 4 GB memory",)
        return Usage(232.0, 145.0, 0.0, 0.0, nodes=30, waiting=waiting, dead_nodes=1, hosts=hosts)


@dataclass
class PageServer:
    """The running server and the data behind it."""

    home: Home
    controller: Controller
    url: str
    token: str

    def submit(self, name: str = "", recipe: str = RECIPE, **fields: object) -> Job:
        asked = {"recipe": recipe, "folder": str(self.home.root), "name": name, **fields}
        return self.controller.jobs.submit(Submission.model_validate(asked))[0]

    def start(self, job: Job) -> EventLog:
        """Opens an attempt and runs it; the log is what its runner would write."""
        jobs = self.controller.jobs
        attempt = jobs.new_attempt(job.id)
        jobs.move_attempt(attempt.id, "running")
        jobs.move(job.id, "running")
        return EventLog(self.home.runs / attempt.id / "events", "runner")

    def end(self, job: Job, state: str, reason: str = "") -> None:
        jobs = self.controller.jobs
        latest = jobs.get(job.id).latest
        if latest:
            jobs.move_attempt(latest.id, state, reason)  # type: ignore[arg-type]
        jobs.move(job.id, state, reason)  # type: ignore[arg-type]

    def print(self, job: Job, text: str) -> None:
        """Adds to what the driver of the latest attempt printed."""
        latest = self.controller.jobs.get(job.id).latest
        assert latest is not None
        path = self.home.runs / latest.id / "logs" / "driver.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)


def step(key: str, state: str, **values: object) -> Event:
    return StepEvent.model_validate({"step": key, "state": state, "fingerprint": f"{hash(key) % 16:x}" * 64, **values})


def training(log: EventLog, first: int, last: int, of: int) -> None:
    """What training writes for the steps after `first` up to `last`."""
    for at in range(first + 1, last + 1):
        values = {
            "train_loss": 8.3 - 3 * (at / of) ** 0.5 + 0.05 * (at * 7 % 5), "train_tokens_per_second": 7000.0 + at % 9,
            "train_grad_norm": 1 + 1 / at, "train_learning_rate": 3e-3 * (1 - at / of), "train_tokens": 512.0 * at,
            "train_memory_bytes": 1.3e9 + 2e6 * at, "train_data_wait": 0.01 / at, "train_exposed_communication": 0.043,
            "train_max_violation": 0.2 + 1 / at, "train_bias_range": 1e-4 * at, "train_bias_speed": 1e-3,
        }  # fmt: skip
        for name, value in values.items():
            log.append(MetricEvent(step="pretrain", name=name, value=value, at=at))
        for attention, mfu in (("causal", 0.41), ("whole", 0.45)):
            value = mfu - 0.001 * (at % 5)
            log.append(
                MetricEvent(step="pretrain", name="train_mfu", value=value, at=at, labels={"attention": attention})
            )
        for layer in (1, 2, 3):
            labels = {"layer": str(layer)}
            log.append(
                MetricEvent(step="pretrain", name="train_expert_load", value=1 + layer / at, at=at, labels=labels)
            )
    log.append(ProgressEvent(step="pretrain", phase="training", done=last * 512, total=of * 512, unit="tokens"))


def up_to_pretrain(log: EventLog) -> None:
    """A run that has reused or made everything before pretrain, which it has begun."""
    log.append(RunEvent(state="started", recipe="prose"))
    for key in ("corpus", "filter", "dedup", "split"):
        log.append(step(key, "reused", why="have 1f0c2a9b", outcome="unchanged", counts={"out:documents": 1563.0}))
    for key in ("tokenizer", "tokenize"):
        log.append(step(key, "started", why="never run"))
        log.append(step(key, "succeeded", seconds=2.6, outcome="byte-level BPE", counts={"out:tokens": 812000.0}))
    log.append(step("pretrain", "started", why="steps: 200 -> 180"))
    log.append(NoteEvent(step="pretrain", level="info", text="2.8M parameters, 1.3M active per token"))


def log_of(server: PageServer, job: Job) -> EventLog:
    """A training worker's own segment, in the first attempt."""
    return EventLog(server.home.runs / f"{job.id}.1" / "events", "train-0")


@contextlib.contextmanager
def page_server(root: Path, port: int = 0) -> Iterator[PageServer]:
    """An empty MORAY_HOME under `root` and its server, on a free port."""
    home = Home(root)
    (root / "one.txt").write_text("a document")
    idle = ManagedCluster(LOCAL, IdleCluster(), 2, lambda: Topology(2, 0, 1 << 34))
    lab = partial(ManagedCluster, backend=LabCluster(), slots=4, topology=idle.topology, where="http://ray-head:8265")
    find = lambda name: lab(name, store=str(root / "store"))  # noqa: E731
    controller = Controller(home, Database(home.database), idle, find)
    token = ensure_token(home)
    app = build_controller_app(home, controller, Overview(home, controller), token)
    listening = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield PageServer(home, controller, f"http://127.0.0.1:{listening.getsockname()[1]}", token)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def add_schedules(server: PageServer) -> None:
    """One that has ticked and one that is paused."""
    fields = {"recipe": RECIPE, "folder": str(server.home.root)}
    schedules = server.controller.schedules
    hour = time.time() // 3600 * 3600
    schedules.clock = lambda: hour - 60 * 3600
    schedules.add(NewSchedule(**fields, name="nightly", cron="0 2 * * *", tz="Asia/Singapore", retries=1))
    schedules.add(NewSchedule(**fields, name="often", every="6h", overlap="queue", catchup="last"))
    for ago in range(60, -1, -1):
        schedules.clock = lambda ago=ago: hour - ago * 3600
        schedules.tick(hour - ago * 3600)
    schedules.clock = time.time
    schedules.pause("often")


def add_deployment(
    server: PageServer, name: str, model: str = "", reference: str = "export/11c5a112", **fields: Any
) -> None:
    """A deployment that waits for its first round; or, of a known name, another version that starts."""
    new = NewDeployment(model=model or f"{name}@newest", name=name, **fields)
    folder = server.home.root / "artifacts" / reference
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "tokenizer.json"):
        (folder / file).write_text("{}")
    server.controller.deployments.deploy(new, reference, str(folder), 0, str(server.home.root / "deployments"))


def make_live(server: PageServer, name: str, number: int = 1) -> None:
    """A version becomes live and replaces the one before."""
    deployments = server.controller.deployments
    before = deployments.get(name).live
    deployments.move_version(name, number, "live")
    if before:
        deployments.move_version(name, before.number, "replaced")
    deployments.move(name, "running")


def replica_log(server: PageServer, name: str, replica: str = "x") -> EventLog:
    """The segment that a replica would write."""
    return EventLog(server.home.root / "deployments" / name / "events", f"replica-{replica}")


def report(log: EventLog, name: str, requests: int, version: int = 1, **fields: Any) -> None:
    """What a replica with three MoE layers reports after some requests."""
    values = {
        "requests": requests, "prompt_tokens": 5 * requests, "completion_tokens": 48 * requests, "running": 6,
        "waiting": 2, "first_token": (0.024, 0.0383), "tokens_per_second": 490.0 + requests % 9,
        "expert_load": (2.3, 1.4, 1.0 + requests / 1000), **fields,
    }  # fmt: skip
    log.append(
        ServingEvent(deployment=name, version=str(version), reference="export/11c5a112", replica=log.writer, **values)
    )


def see_replicas(server: PageServer, port: int = 8000, **replicas: tuple[ReplicaSeen, ...]) -> None:
    """What Ray Serve would report, by deployment."""
    serving = server.controller.serving(LOCAL)
    assert serving is not None
    found = {name: DeploymentSeen("running", replicas=seen) for name, seen in replicas.items()}
    serving.seen = ServingSeen("127.0.0.1", port, ("127.0.0.1",), found)


def several_deployments(server: PageServer, port: int = 8000) -> EventLog:
    """One that runs its second version and has four states beside it; returns the log of its replica."""
    add_deployment(server, "quickstart", port=port, options=ServeOptions(replicas=1, most_replicas=3))
    make_live(server, "quickstart")
    over = {"running": 0, "waiting": 0, "first_token": None, "tokens_per_second": 0.0, "expert_load": ()}
    report(replica_log(server, "quickstart", "old"), "quickstart", 1200, failed=3, **over)
    add_deployment(server, "quickstart", reference="export/7d20ee41", options=ServeOptions(replicas=1, most_replicas=3))
    make_live(server, "quickstart", 2)
    deployments = server.controller.deployments
    add_deployment(server, "prose")
    deployments.move("prose", "starting", "a replica needs 8 CPU, which no host has: the largest host has 2 CPU")
    add_deployment(server, "letters")
    deployments.move_version("letters", 1, "failed", "FileNotFoundError: config.json is missing")
    deployments.move("letters", "failed", "FileNotFoundError: config.json is missing")
    add_deployment(server, "verse")
    make_live(server, "verse")
    add_deployment(server, "verse", reference="export/9a8b7c6d")
    deployments.move("verse", "rolling", "1 of 2 replicas run version 2")
    add_deployment(server, "earlier")
    make_live(server, "earlier")
    deployments.stop("earlier")
    deployments.move("earlier", "stopped", "stopped by a user")
    see_replicas(
        server,
        port,
        quickstart=(ReplicaSeen("dwedabhs", "running", "10.0.0.5"), ReplicaSeen("k2ff0zq1", "starting")),
        verse=(ReplicaSeen("abc123", "running", "10.0.0.6"),),
    )
    log = replica_log(server, "quickstart")
    report(log, "quickstart", 115, version=2)
    return log


class _Model(BaseHTTPRequestHandler):
    """Answers a prompt with its words, one per event; "fail" with an error, and "wait" after `Model.release`."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        assert isinstance(server, Model)
        server.bodies.append(body)
        if body["prompt"] == "fail":
            self._start(400, "application/json")
            self.wfile.write(json.dumps({"error": {"message": "prompt: is too sad", "type": "x"}}).encode())
            return
        self._start(200, "text/event-stream")
        for word in body["prompt"].split(" "):
            if word == "wait":
                server.release.wait(30)
            if word == "break":
                return self._event({"error": {"message": "the replica stopped during this response"}})
            self._event({"choices": [{"text": f"{word} ", "index": 0, "finish_reason": None}], "usage": None})
        self._event({"choices": [{"text": "", "index": 0, "finish_reason": "length"}], "usage": None})
        self._event({"choices": [], "usage": {"completion_tokens": len(body["prompt"].split(" "))}})
        self._write("data: [DONE]\n\n")

    def _start(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def _event(self, data: Mapping[str, Any]) -> None:
        self._write(f"data: {json.dumps(data)}\n\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(ConnectionError):  # a client that has stopped
            self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


class Model(ThreadingHTTPServer):
    """A server of /v1/completions. bodies: of its requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Model)
        self.bodies: list[dict[str, Any]] = []
        self.release = threading.Event()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


@contextlib.contextmanager
def model_server() -> Iterator[Model]:
    server = Model()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()
