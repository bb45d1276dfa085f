"""SIGKILL of a run in each of its steps, then the same command again: the result is the undisturbed run's, bit by bit.

The whole matrix is evidence; `make test` kills one run, where most is at stake: while it trains.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from moray.platform.core.events import EventTail, ProgressEvent, StepEvent
from moray.platform.core.home import Home
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.search import artifacts_of
from tests.checkout import ROOT
from tests.conftest import Flow
from tests.small_run import STEPS, recipe_text

UNTIL = "export"  # the last step whose bytes must not depend on what happened


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to: its home, its text, and the hashes of its tokens and weights."""

    home: Home
    folder: Path
    hashes: dict[str, str]


def start(home: Home, recipe: Path, *arguments: str) -> subprocess.Popen[str]:
    home.root.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "moray.py"), "run", str(recipe), "--json", *arguments]
    environment = {**os.environ, "MORAY_HOME": str(home.root)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return dict(json.loads(out))


def hashes(home: Home) -> dict[str, str]:
    """SHA-256 of every token shard and of the exported weights."""
    store = ArtifactStore(home)
    return {
        entry.path: entry.sha256
        for step in ("tokenize", "export")
        for artifact in artifacts_of(store, step)
        for entry in artifact.manifest.files
        if entry.path.endswith((".bin", ".safetensors"))
    }


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.02)


def processes_of(home: Home) -> list[psutil.Process]:
    """Processes that carry this home in their command line: Ray's daemons and workers of its runs."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        if str(home.root) in " ".join(process.info["cmdline"] or ()) and process.info["status"] != "zombie":
            found.append(process)
    return found


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def is_working_on(home: Home, step: str) -> bool:
    """Whether the run has visibly begun the step: a checkpoint for pretrain, else its start or first progress."""
    if step == "pretrain":
        return any(home.artifacts.glob("pretrain/*/checkpoints/step-*"))
    for folder in home.runs.glob("*/events"):
        for event in EventTail(folder).poll():
            if isinstance(event, ProgressEvent) and event.step == step:
                return True
            if isinstance(event, StepEvent) and event.step == step and event.state == "started" and step in QUIET:
                return True
    return False


QUIET = ("register", "smoke-serve", "evaluate")  # killed as soon as they start


@pytest.fixture
def undisturbed(flow: Flow) -> Undisturbed:
    (flow.folder / "small.yaml").write_text(recipe_text(flow.folder, UNTIL))
    (flow.folder / "whole.yaml").write_text(recipe_text(flow.folder))
    return Undisturbed(flow.home, flow.folder, hashes(flow.home))


def kill_in(step: str, undisturbed: Undisturbed, home: Home, *rerun: str) -> None:
    """Brings a new home up to `step`, kills the run in it, runs it again (with options `rerun`), and compares."""
    for earlier in STEPS[: STEPS.index(step)]:
        if (undisturbed.home.artifacts / earlier).exists():
            shutil.copytree(undisturbed.home.artifacts / earlier, home.artifacts / earlier)
    home.root.mkdir(exist_ok=True)
    before = shared_memory()
    recipe = undisturbed.folder / ("small.yaml" if step in STEPS[: STEPS.index(UNTIL) + 1] else "whole.yaml")
    victim = start(home, recipe)
    wait_for(lambda: is_working_on(home, step) or victim.poll() is not None, f"{step} began")
    assert victim.poll() is None, "the run was over before it could be killed"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    wait_for(lambda: not processes_of(home), "the end of every process of the killed run", 30)
    wait_for(lambda: shared_memory() <= before, "the end of its shared memory", 30)
    assert ArtifactStore(home).aliases.all() == {} or step == "smoke-serve"
    finish(start(home, recipe, *rerun))
    assert hashes(home) == undisturbed.hashes
    assert not list(home.artifacts.rglob("*.lease"))
    wait_for(lambda: not processes_of(home), "the end of every process of the rerun", 30)


@pytest.mark.evidence
def test_a_run_killed_in_training_resumes_to_the_same_weights(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The rerun has one CPU, which must be enough for two training workers and change no bit."""
    kill_in("pretrain", undisturbed, Home(tmp_path / "home"), "--cpus", "1")


@pytest.mark.evidence
def test_one_cpu_is_enough_for_everything(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Pools of actors that take every CPU hang Ray Data; two workers on one CPU must still be placed."""
    home = Home(tmp_path / "home")
    finish(start(home, undisturbed.folder / "whole.yaml", "--cpus", "1"))
    assert hashes(home) == undisturbed.hashes


@pytest.mark.evidence
@pytest.mark.parametrize("step", STEPS)
def test_a_run_killed_in_any_step_ends_the_same(step: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    kill_in(step, undisturbed, Home(tmp_path / "home"))


@pytest.mark.evidence
def test_two_runs_at_once_share_the_work(undisturbed: Undisturbed, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    one, other = (start(home, undisturbed.folder / "small.yaml") for _ in range(2))
    results = [finish(one), finish(other)]
    rows = [{row["step"]: row["reused"] for row in result["steps"]} for result in results]  # type: ignore[attr-defined]
    for step in rows[0]:
        assert sorted([rows[0][step], rows[1][step]]) == [False, True], f"{step} was made once"
    assert hashes(home) == undisturbed.hashes


@pytest.mark.evidence
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_leaves_nothing_running(
    number: signal.Signals, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    process = start(home, undisturbed.folder / "small.yaml")
    wait_for(lambda: is_working_on(home, "dedup") or process.poll() is not None, "dedup began")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not out
    assert err.rstrip().splitlines()[-2:] == ["error: stopped", "hint: run the same command again to resume"]
    wait_for(lambda: not processes_of(home), "the end of every process", 30)
    finish(start(home, undisturbed.folder / "small.yaml"))
    assert hashes(home) == undisturbed.hashes
