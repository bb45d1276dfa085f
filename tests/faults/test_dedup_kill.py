"""kill -9 while dedup works, of the run and of its workers, at random points of every phase: the result is the same."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from moray.platform.core.home import Home
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.search import artifacts_of
from tests.faults.test_kill import finish, processes_of, start, wait_for

RECIPE = """
name: kills
steps:
  corpus:
    with:
      shard_bytes: 400000
      sources:
        - {name: python, path: "${python:stdlib}", include: ["*.py", "*/*.py"], exclude: ["site-packages/*", "test/*"]}
        - {name: packages, path: "${python:site-packages}", include: ["pip/**/*.py", "*.dist-info/**/LICENSE*"]}
  dedup: {inputs: {documents: corpus}, with: {index: nights}}
"""
KILLS, WORKER_KILLS = 12, 6
# The last file of each kind of task, or its record: with it, the task is done.
_LAST = (
    ".work/sketches/documents-*.documents.npy", ".work/copies-*.npy", ".work/part-*.arrow",
    ".work/grouped-groups-*.npy", ".work/.records/*.json",
)  # fmt: skip

Files = dict[str, tuple[int, int]]


def finished(home: Home) -> Files:
    """What tasks of dedup have finished, by path: inode and time of the last change."""
    found: Files = {}
    for path in (path for pattern in _LAST for path in home.artifacts.glob(f"dedup/*/{pattern}")):
        try:
            stat = path.stat()
        except FileNotFoundError:  # the run is cleaning up
            continue
        found[str(path.relative_to(home.artifacts))] = (stat.st_ino, stat.st_mtime_ns)
    return found


def result(home: Home) -> dict[str, str]:
    (artifact,) = artifacts_of(ArtifactStore(home), "dedup")
    return {entry.path: entry.sha256 for entry in artifact.manifest.files}


def tasks(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes of Ray that work on shards right now: they are called after what they do."""
    found = []
    for child in psutil.Process(run.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith("ray::") and "Map" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.evidence
def test_a_dedup_killed_at_random_points_ends_the_same(tmp_path: Path) -> None:
    recipe = tmp_path / "kills.yaml"
    recipe.write_text(RECIPE)
    whole = Home(tmp_path / "whole")
    seen: Files = {}
    undisturbed = start(whole, recipe)
    while undisturbed.poll() is None:
        seen |= finished(whole)
    finish(undisturbed)
    generator, home = random.Random(7), Home(tmp_path / "home")
    points = sorted(generator.randrange(len(seen)) for _ in range(KILLS))
    before: Files = {}
    for number, point in enumerate(points):
        victim = start(home, recipe, "--cpus", str(1 + number % 2))
        known = set(before)  # at the end of the step, files of its tasks go

        def reached(point: int = point, known: set[str] = known, victim: subprocess.Popen[str] = victim) -> bool:
            known.update(finished(home))
            return len(known) > point or victim.poll() is not None

        wait_for(reached, f"file {point}")
        assert victim.poll() is None, "the run was over before it could be killed"
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        wait_for(lambda: not processes_of(home), "the end of every process of the killed run", 30)
        now = finished(home)
        assert {path: now[path] for path in before} == before, "what was finished is not done again"
        before = now
    finish(start(home, recipe))
    assert result(home) == result(whole)


@pytest.mark.evidence
def test_workers_killed_while_they_work_change_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "kills.yaml"
    recipe.write_text(RECIPE)
    whole, home = Home(tmp_path / "whole"), Home(tmp_path / "home")
    finish(start(whole, recipe))
    run, killed, last = start(home, recipe), 0, 0
    while run.poll() is None and killed < WORKER_KILLS:
        files = len(finished(home))
        if files > last and (victims := tasks(run)):
            os.kill(victims[0].pid, signal.SIGKILL)
            killed, last = killed + 1, files + 4
    finish(run)
    assert killed >= 3
    assert result(home) == result(whole)
