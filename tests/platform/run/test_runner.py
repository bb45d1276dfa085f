"""The runner: existing artifacts are reused; a failed step is reported and leaves nothing that looks finished."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from moray.platform.core.cluster import Cluster, Topology
from moray.platform.core.errors import Cancelled, InputError, StepFailed
from moray.platform.core.events import Event, NoteEvent, RunEvent, StepEvent, UsageEvent, read_events
from moray.platform.core.home import Home
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.recipe import PlannedStep, Recipe
from moray.platform.plan.step import Step
from moray.platform.run.runner import Runner, plan_steps
from moray.platform.store.artifacts import ArtifactStore


class NoRay(Cluster):
    """A cluster for steps that need none; starting it would be a failure."""

    stopped = 0

    def ensure(self) -> Topology:
        raise AssertionError("no step here needs Ray")

    def topology(self) -> Topology:
        return Topology(cpus=2, gpus=0, memory_bytes=1 << 30)

    def stop(self) -> None:
        self.stopped += 1


class WriteConfig(StepConfig):
    text: str = "x"


class Write(Step[WriteConfig]):
    """Writes its text and its input's; `during` lets a test look in while it runs."""

    name: ClassVar[str] = "write"
    Config = WriteConfig
    produces: ClassVar[str] = "text"

    def __init__(self, during: Callable[[StepContext[WriteConfig]], None] = lambda ctx: None) -> None:
        self._during = during

    def run(self, ctx: StepContext[WriteConfig]) -> None:
        before = "".join((a.folder / "out").read_text() for a in ctx.inputs.values())
        (ctx.folder / "out").write_text(before + ctx.config.text)
        self._during(ctx)
        ctx.counts["out:letters"] = len(before + ctx.config.text)


def recipe(*texts: str, during: Callable[[StepContext[Any]], None] = lambda ctx: None) -> Recipe:
    """A chain of Write steps s0, s1, ..., the last one with `during`."""
    steps = []
    for i, text in enumerate(texts):
        step = Write(during) if i == len(texts) - 1 else Write()
        inputs = {"before": f"s{i - 1}"} if i else {}
        steps.append(PlannedStep(f"s{i}", step, WriteConfig(text=text), inputs))
    return Recipe("chain", Path("chain.yaml"), tuple(steps), "name: chain\n")


def run(home: Home, made: Recipe) -> tuple[Any, list[Event]]:
    seen: list[Event] = []
    return Runner(home, NoRay(), [seen.append]).run(made), seen


def test_a_second_run_reuses_and_a_change_reruns_from_there(home: Home) -> None:
    first, _ = run(home, recipe("a", "b", "c"))
    assert (first.steps["s2"].artifact.folder / "out").read_text() == "abc"
    assert [row.reused for row in first.steps.values()] == [False] * 3
    second, _ = run(home, recipe("a", "b", "c"))
    assert [row.reused for row in second.steps.values()] == [True] * 3
    third, _ = run(home, recipe("a", "B", "c"))
    assert [row.reused for row in third.steps.values()] == [True, False, False]
    assert (third.steps["s2"].artifact.folder / "out").read_text() == "aBc"


def test_the_plan_names_changes_and_writes_nothing(home: Home) -> None:
    run(home, recipe("a", "b"))
    before = sorted(home.root.rglob("*"))
    decisions = plan_steps(recipe("a", "B"), ArtifactStore(home))
    assert [d.reuse for d in decisions] == [True, False]
    assert decisions[1].why == "text: 'b' -> 'B'"
    assert sorted(home.root.rglob("*")) == before


def test_manifest_events_and_usage_record_the_work(home: Home) -> None:
    result, seen = run(home, recipe("a", "b"))
    manifest = result.steps["s1"].artifact.manifest
    assert manifest.inputs == {"before": result.steps["s0"].artifact.reference}
    assert manifest.counts == {"out:letters": 2}
    assert manifest.cpu_seconds == pytest.approx(2 * manifest.seconds)
    assert read_events(result.folder) == seen
    assert [e.state for e in seen if isinstance(e, StepEvent)] == ["started", "succeeded"] * 2
    assert [e.cpus for e in seen if isinstance(e, UsageEvent)] == [2.0, 2.0]


def test_a_step_that_raises_names_itself_and_keeps_its_traceback(home: Home) -> None:
    def burst(ctx: StepContext[Any]) -> None:
        raise ZeroDivisionError("by nought")

    with pytest.raises(StepFailed, match="step 's1' failed: ZeroDivisionError: by nought") as caught:
        run(home, recipe("a", "b", during=burst))
    log = Path(caught.value.hint.removeprefix("details: "))
    assert "in burst" in log.read_text()
    events = read_events(log.parent.parent)
    assert [e.state for e in events if isinstance(e, RunEvent)] == ["started", "failed"]
    assert [e.state for e in events if isinstance(e, UsageEvent)] == ["succeeded", "failed"], "failures cost too"
    result, _ = run(home, recipe("a", "b"))
    assert [row.reused for row in result.steps.values()] == [True, False]


def test_a_users_mistake_keeps_its_words(home: Home) -> None:
    def mistake(ctx: StepContext[Any]) -> None:
        raise InputError("the corpus is empty", "add text")

    with pytest.raises(InputError, match="the corpus is empty"):
        run(home, recipe("a", during=mistake))


def test_the_cluster_is_stopped_whatever_happens(home: Home) -> None:
    def cancel(ctx: StepContext[Any]) -> None:
        raise Cancelled

    cluster = NoRay()
    with pytest.raises(Cancelled):
        Runner(home, cluster).run(recipe("a", during=cancel))
    assert cluster.stopped == 1
    assert not list(home.artifacts.rglob("*.lease")), "the lease is given back"


def test_a_rival_waits_and_reuses(home: Home) -> None:
    """Two runs of one recipe at once: one works, the other waits and gets the same artifact."""
    working, go_on = threading.Event(), threading.Event()
    runs: list[int] = []

    def slowly(ctx: StepContext[Any]) -> None:
        runs.append(1)
        working.set()
        assert go_on.wait(30)

    results: list[Any] = []
    first = threading.Thread(target=lambda: results.append(run(home, recipe("a", "b", during=slowly))))
    first.start()
    assert working.wait(30)
    seen: list[Event] = []

    def follow(event: Event) -> None:
        seen.append(event)
        if isinstance(event, StepEvent) and event.state == "waiting":
            go_on.set()

    rival = Runner(home, NoRay(), [follow]).run(recipe("a", "b", during=slowly))
    first.join()
    assert len(runs) == 1
    assert rival.steps["s1"].reused
    assert rival.steps["s1"].artifact.manifest == results[0][0].steps["s1"].artifact.manifest


def test_work_in_progress_is_not_an_artifact(home: Home) -> None:
    store = ArtifactStore(home)

    def look(ctx: StepContext[Any]) -> None:
        assert (ctx.folder / "out").exists()
        assert store.get("write", ctx.fingerprint) is None

    result, _ = run(home, recipe("a", during=look))
    assert store.get("write", result.steps["s0"].artifact.fingerprint) is not None


def test_the_plan_names_the_source_that_changed(home: Home, tmp_path: Path) -> None:
    from dataclasses import asdict

    from moray.platform.plan.change_reason import explain_change
    from moray.platform.plan.fingerprint import addresses
    from moray.platform.plan.recipe import parse_recipe

    result, _ = run(home, recipe("a"))
    any_artifact = result.steps["s0"].artifact
    text = f"name: demo\nsteps:\n  corpus: {{with: {{sources: [{{name: here, path: {tmp_path / 'in'}}}]}}}}\n"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one")
    before = addresses(parse_recipe(text, Path("demo.yaml")))["corpus"]
    manifest = any_artifact.manifest.model_copy(update={"address": asdict(before)})
    old = type(any_artifact)(any_artifact.folder, manifest)
    (tmp_path / "in" / "b.txt").write_text("three")
    now = addresses(parse_recipe(text, Path("demo.yaml")))["corpus"]
    assert explain_change(now, old) == "source here changed (1 -> 2 files, 3 -> 8 bytes)"
    assert explain_change(before, old) == "its artifact was removed"
    assert explain_change(now, None) == "never run"


def test_an_artifact_made_by_other_code_is_reused_with_a_warning(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from moray.platform.plan import change_reason

    run(home, recipe("a"))
    monkeypatch.setattr(change_reason, "source_hash", lambda step: "another")
    assert plan_steps(recipe("a"), ArtifactStore(home))[0].why.endswith("made by a different code version")
    result, seen = run(home, recipe("a"))
    assert result.steps["s0"].reused
    assert [e.text for e in seen if isinstance(e, NoteEvent) and e.level == "warning"] != []
