"""The disk runs full in the middle of a step, on a real small file system; with room, the same command then succeeds.

A tmpfs is mounted as MORAY_HOME, and shrunk to what it holds while the step works.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moray.platform.core.errors import StepFailed
from moray.platform.core.events import EventLog, NoteEvent, RunEvent, read_events
from moray.platform.core.home import Home
from moray.platform.plan.context import StepContext
from moray.platform.run.history import list_runs
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.search import artifacts_of, local_artifacts
from tests.conftest import Flow
from tests.faults.test_kill import (
    STEPS,
    UNTIL,
    Undisturbed,
    finish,
    hashes,
    is_working_on,
    processes_of,
    start,
    wait_for,
)
from tests.platform.run.test_runner import recipe, run
from tests.small_disk import empty, fill, small_disk
from tests.small_run import recipe_text


@pytest.fixture
def undisturbed(flow: Flow) -> Undisturbed:
    (flow.folder / "small.yaml").write_text(recipe_text(flow.folder, UNTIL))
    return Undisturbed(flow.home, flow.folder, hashes(flow.home))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def test_an_event_that_does_not_fit_is_taken_back_whole(disk: Path) -> None:
    log = EventLog(disk / "run" / "events", "runner")
    told: list[str] = []
    log.listeners.append(lambda event: told.append(event.text) if isinstance(event, NoteEvent) else None)
    log.append(NoteEvent(step="s", level="info", text="first"))
    fill(disk)
    for _ in range(3):
        log.append(NoteEvent(step="s", level="info", text="x" * 5000))
    empty(disk)
    log.append(NoteEvent(step="s", level="info", text="last"))
    log.close()
    assert [len(text) for text in told] == [5, 5000, 5000, 5000, 4]
    events = read_events(disk / "run")
    assert [event.text for event in events if isinstance(event, NoteEvent)] == ["first", "last"]
    assert [event.sequence for event in events] == [0, 1]


def test_a_full_disk_does_not_hide_the_error_of_a_step(disk: Path) -> None:
    def burst(ctx: StepContext[object]) -> None:  # type: ignore[type-var]
        fill(disk)
        raise ZeroDivisionError("by nought")

    with pytest.raises(StepFailed, match="ZeroDivisionError: by nought"):
        run(Home(disk), recipe("a", during=burst))


def test_a_full_disk_is_named_wherever_it_shows(disk: Path) -> None:
    home = Home(disk)

    def write(ctx: StepContext[object]) -> None:  # type: ignore[type-var]
        fill(disk)
        (ctx.folder / "more").write_bytes(b"x" * 100_000)

    for during in (write, lambda ctx: fill(disk)):  # in the step; where its manifest is to be written
        with pytest.raises(StepFailed, match="No space left on device") as caught:
            run(home, recipe("a", during=during))
        assert caught.value.hint == f"free disk space for {disk}, then run again"
        assert list(local_artifacts(ArtifactStore(home))) == []
        empty(disk)
    result, _ = run(home, recipe("a"))
    assert (result.steps["s0"].artifact.folder / "out").read_text() == "a"
    assert next(row.state for row in list_runs(home)) == "succeeded"
    assert [e.state for e in read_events(result.folder) if isinstance(e, RunEvent)] == ["started", "succeeded"]


def fill_in(step: str, undisturbed: Undisturbed, disk: Path) -> None:
    """Brings a home on the small disk up to `step`, fills the disk in it, makes room, and compares."""
    home = Home(disk)
    for earlier in STEPS[: STEPS.index(step)]:
        if (undisturbed.home.artifacts / earlier).exists():
            shutil.copytree(undisturbed.home.artifacts / earlier, home.artifacts / earlier)
    victim = start(home, undisturbed.folder / "small.yaml")
    wait_for(lambda: is_working_on(home, step) or victim.poll() is not None, f"{step} began")
    fill(disk)
    out, err = victim.communicate(timeout=300)
    assert victim.returncode == 1, err
    assert out == ""
    said = [line for line in err.splitlines() if line.startswith(("error:", "hint:"))]
    assert [line.partition(":")[0] for line in said] == ["error", "hint"], err
    assert err.splitlines()[-2:] == said
    assert "Traceback" not in err
    assert said[1] == f"hint: free disk space for {disk}, then run again"
    assert not list(artifacts_of(ArtifactStore(home), step))
    wait_for(lambda: not processes_of(home), "the end of every process", 30)
    empty(disk)
    finish(start(home, undisturbed.folder / "small.yaml"))
    assert hashes(home) == undisturbed.hashes


@pytest.mark.evidence
@pytest.mark.parametrize("step", ["corpus", "dedup", "tokenize", "pretrain"])
def test_a_disk_that_runs_full_in_a_step(step: str, undisturbed: Undisturbed, disk: Path) -> None:
    fill_in(step, undisturbed, disk)
