"""`moray runs` and `moray artifacts`, over real runs of steps that need no Ray."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moray.platform.cli.main import main
from moray.platform.core.errors import InputError
from moray.platform.core.events import EventLog, RunEvent, StepEvent
from moray.platform.core.home import Home
from moray.platform.plan.context import StepContext
from moray.platform.run.history import find_run, in_use, list_runs
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.lease import Lease
from moray.platform.store.search import local_artifacts
from moray.platform.store.sweep import leased
from tests.platform.run.test_runner import recipe, run


@dataclass
class Shell:
    """The command line on one MORAY_HOME, in this process."""

    home: Home
    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """stdout and stderr of a command that must end with `code`."""
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        shown = self.capture.readouterr()
        assert stopped.value.code == code, shown.err
        return shown.out, shown.err

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json")[0])


@pytest.fixture
def moray(home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.setenv("MORAY_HOME", str(home.root))
    return Shell(home, capsys)


def letters(home: Home, *texts: str) -> list[str]:
    """Runs a chain of steps; the references of what they made, each made from the one before."""
    result, _ = run(home, recipe(*texts))
    return [row.artifact.reference for row in result.steps.values()]


def failed_run(home: Home) -> None:
    def burst(ctx: StepContext[Any]) -> None:
        raise InputError("no such thing")

    with pytest.raises(InputError):
        run(home, recipe("a", "z", during=burst))


def left(home: Home) -> set[str]:
    return {artifact.reference for artifact in local_artifacts(ArtifactStore(home))}


def test_runs_are_listed_newest_first_with_their_steps(moray: Shell) -> None:
    letters(moray.home, "a", "b")
    letters(moray.home, "a", "B")
    failed_run(moray.home)
    (moray.home.runs / "logs").mkdir()
    rows = moray.json("runs", "list")
    assert [(row["state"], row["made"], row["reused"]) for row in rows] == [
        ("failed", 0, 1),
        ("succeeded", 1, 1),
        ("succeeded", 2, 0),
    ]
    shown, other = moray("runs", "list")
    assert rows[0]["run"] in shown
    assert not other, "stdout carries the result"


def test_a_run_shows_its_steps_and_their_cost(moray: Shell) -> None:
    references = letters(moray.home, "a", "b")
    letters(moray.home, "a", "b")
    second, first = list_runs(moray.home)
    shown = moray.json("runs", "show", first.run)
    assert [step["artifact"] for step in shown["steps"]] == references
    seconds = sum(step["seconds"] for step in shown["steps"])
    assert shown["core_hours"] == pytest.approx(2 * seconds / 3600), "two cores were held"
    again = moray.json("runs", "show", second.run.rpartition("-")[2])
    assert [step["state"] for step in again["steps"]] == ["reused", "reused"]
    assert again["core_hours"] == 0
    assert references[1] in moray("runs", "show", first.run)[0]


def test_a_failed_step_has_a_cost_and_a_reason(moray: Shell) -> None:
    failed_run(moray.home)
    (row,) = list_runs(moray.home)
    found = find_run(moray.home, row.run)
    assert found.detail == "no such thing"
    assert [step.state for step in found.steps.values()] == ["succeeded", "failed"]
    assert found.steps["s1"].artifact is None
    assert found.steps["s1"].core_hours > 0


def test_diff_names_steps_fields_and_metrics(moray: Shell) -> None:
    old, new = letters(moray.home, "a", "b", "c"), letters(moray.home, "a", "BB", "c")
    b, a = (row.run for row in list_runs(moray.home))
    found = moray.json("runs", "diff", a, b)
    assert found["same"] == ["s0"]
    assert [change["step"] for change in found["changed"]] == ["s1", "s2"]
    assert found["changed"][0]["config"] == [{"field": "text", "old": "b", "new": "BB"}]
    assert found["changed"][1]["config"] == [], "only its input changed"
    assert (found["changed"][1]["old"], found["changed"][1]["new"]) == tuple(
        name.partition("/")[2] for name in (old[2], new[2])
    )
    assert {"step": "s2", "name": "out:letters", "a": 3.0, "b": 4.0} in found["metrics"]
    shown, _ = moray("runs", "diff", a, b)
    assert "'BB'" in shown
    assert "out:letters" in shown


def test_metrics_of_a_reused_step_come_from_the_run_that_made_it(moray: Shell) -> None:
    def measure(ctx: StepContext[Any]) -> None:
        ctx.metric("train_loss", 4.0, at=1)
        ctx.metric("train_loss", 3.0, at=2)

    run(moray.home, recipe("a", during=measure))
    letters(moray.home, "a")
    b, a = (row.run for row in list_runs(moray.home))
    assert {"step": "s0", "name": "train_loss", "a": 3.0, "b": 3.0} in moray.json("runs", "diff", a, b)["metrics"]


def test_a_run_of_another_version_is_listed_as_unreadable(moray: Shell) -> None:
    letters(moray.home, "a")
    folder = moray.home.runs / "later" / "events"
    folder.mkdir(parents=True)
    (folder / "runner-1-ab.jsonl").write_text('{"kind": "dream"}\n')
    assert {row["state"] for row in moray.json("runs", "list")} == {"succeeded", "unreadable"}
    assert "error: run later" in moray("runs", "show", "later", code=2)[1]


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["runs", "lsit"], "unknown command 'lsit'", "did you mean 'list'?"),
        (["runs", "show", "nothing"], "unknown run 'nothing'", ""),
        (["runs", "show", "chain"], "matches 2 runs", "give a longer part"),
        (["artifacts", "pin", "write/zz"], "unknown artifact 'write/zz'", ""),
        (["artifacts", "gc", "--limit", "much"], "invalid size 'much'", "10GB"),
    ],
)
def test_a_mistake_is_one_error(moray: Shell, arguments: list[str], error: str, hint: str) -> None:
    letters(moray.home, "a")
    letters(moray.home, "b")
    shown, said = moray(*arguments, code=2)
    assert not shown
    assert said.startswith("error: ")
    assert error in said
    assert hint in said


def test_artifacts_are_listed_with_their_pins_and_aliases(moray: Shell) -> None:
    first, second = letters(moray.home, "a", "b")
    store = ArtifactStore(moray.home)
    store.aliases.set("demo", "newest", second)
    assert moray.json("artifacts", "pin", first) == {"pinned": first}
    held = {row["artifact"]: row["held_by"] for row in moray.json("artifacts", "list")}
    assert held == {first: ["a pin"], second: ["alias demo@newest"]}
    assert "alias demo@newest" in moray("artifacts", "list")[0]
    moray("artifacts", "unpin", first)
    assert "is not pinned" in moray("artifacts", "unpin", first, code=2)[1]


def test_gc_keeps_pinned_and_aliased_artifacts_and_their_ancestors(moray: Shell) -> None:
    kept, loose = letters(moray.home, "a", "b"), letters(moray.home, "c", "d")
    store = ArtifactStore(moray.home)
    store.aliases.set("demo", "newest", kept[1])
    would = moray.json("artifacts", "gc", "--limit", "0", "--dry-run")
    assert would["removed"] == [loose[1], loose[0]]
    assert left(moray.home) == {*kept, *loose}
    did = moray.json("artifacts", "gc", "--limit", "0")
    assert did == {**would, "dry_run": False}
    assert left(moray.home) == set(kept)
    assert not list((moray.home.artifacts / ".removed").iterdir())
    shown, said = moray("artifacts", "gc", "--limit", "0")
    assert shown.startswith("freed 0 B")
    assert "over the limit" in said
    assert [row.reused for row in run(moray.home, recipe("a", "b"))[0].steps.values()] == [True, True]


def test_gc_stops_at_the_limit(moray: Shell) -> None:
    old, new = letters(moray.home, "a"), letters(moray.home, "b")
    assert moray.json("artifacts", "gc", "--limit", "1")["removed"] == old
    assert left(moray.home) == set(new)
    assert moray.json("artifacts", "gc")["removed"] == [], "10 GB by default"


def test_rm_rejects_a_needed_artifact_and_names_the_alias_or_pin(moray: Shell) -> None:
    first, second = letters(moray.home, "a", "b")
    store = ArtifactStore(moray.home)
    store.aliases.set("demo", "newest", second)
    for reference in (first, second):
        assert "alias demo@newest" in moray("artifacts", "rm", reference, code=2)[1]
    (moray.home.aliases / "demo@newest").unlink()
    moray("artifacts", "pin", second)
    assert f"hint: moray artifacts unpin {second}" in moray("artifacts", "rm", second, code=2)[1]
    moray("artifacts", "unpin", second)
    assert moray.json("artifacts", "rm", second) == {"removed": second}
    assert left(moray.home) == {first}


def test_artifacts_of_active_runs_are_never_removed(moray: Shell) -> None:
    """From inside a run: its first step is done and no manifest names it yet, its second is in work."""
    said: dict[str, Any] = {}

    def look(ctx: StepContext[Any]) -> None:
        (first,) = left(moray.home)
        said["gc"] = moray.json("artifacts", "gc", "--limit", "0")["removed"]
        said["rm"] = moray("artifacts", "rm", first, code=2)[1]
        assert (ctx.folder / "out").exists()

    run(moray.home, recipe("a", "b", during=look))
    assert said["gc"] == []
    assert "is in use by a run" in said["rm"]
    assert not in_use(moray.home), "nothing is, once the run has ended"


def test_a_killed_run_does_not_protect_its_artifacts(moray: Shell) -> None:
    (reference,) = letters(moray.home, "a")
    log = EventLog(moray.home.runs / "killed" / "events", "runner")
    log.append(RunEvent(state="started", recipe="killed"))
    log.append(StepEvent(step="s0", state="reused", fingerprint=reference.partition("/")[2]))
    assert in_use(moray.home) == {reference.partition("/")[2]}, "it may be between two steps"
    set_age(Path(log.folder), seconds=120)
    assert in_use(moray.home) == set()
    lease = Lease(ArtifactStore(moray.home).lease_path("write", "ab" * 16))
    assert lease.acquire()
    assert in_use(moray.home) == {reference.partition("/")[2]}, "or in a step that says nothing"
    assert leased(ArtifactStore(moray.home)) == {"write/" + "ab" * 16}
    lease.release()


def set_age(folder: Path, seconds: float) -> None:
    import os
    import time

    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds, time.time() - seconds))
