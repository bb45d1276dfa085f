"""Metrics reach the user's programs while a run runs, and a program that fails does not disturb the run."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from moray.platform.core.cluster import Cluster, Topology
from moray.platform.core.errors import InputError, RecipeError, StepFailed
from moray.platform.core.events import Event, MetricEvent, NoteEvent
from moray.platform.core.home import Home
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.recipe import PlannedStep, Recipe, parse_recipe
from moray.platform.plan.step import Step
from moray.platform.plan.tracking import Tracking
from moray.platform.run import metric_sink
from moray.platform.run.metric_sink import MetricSink, SinkThread, TrackedStep, curve_name
from moray.platform.run.runner import Runner

STEP = TrackedStep("r", "pretrain", "ab" * 16)


class NoCluster(Cluster):
    def ensure(self) -> Topology:
        return self.topology()

    def topology(self) -> Topology:
        return Topology(cpus=2, gpus=0, memory_bytes=1 << 30)

    def stop(self) -> None:
        """There is nothing to stop."""


class Curve(Step[StepConfig]):
    """Reports metrics as training does: after `fails` it has ended as if killed, and its rerun goes on before that."""

    name: ClassVar[str] = "curve"
    Config = StepConfig
    produces: ClassVar[str] = "curve"

    def __init__(self, steps: range, during: Callable[[], None] = lambda: None, fails: bool = False) -> None:
        self._steps, self._during, self._fails = steps, during, fails

    def run(self, ctx: StepContext[StepConfig]) -> None:
        for at in self._steps:
            ctx.metric("train_loss", 10.0 - at, at)
            ctx.metric("train_expert_load", 1.0, at, layer="3")
        self._during()
        if self._fails:
            raise StepFailed("killed")
        (ctx.folder / "out").write_text("done")


def run_curve(home: Home, tracking: Tracking, step: Step[Any]) -> list[Event]:
    events: list[Event] = []
    planned = PlannedStep("pretrain", step, StepConfig(), {})
    recipe = Recipe("tracked", Path("tracked.yaml"), (planned,), "name: tracked\n", tracking=tracking)
    try:
        Runner(home, NoCluster(), [events.append]).run(recipe)
    except StepFailed:
        assert step._fails
    return events


def warnings(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, NoteEvent) and event.level == "warning"]


class Sink(MetricSink):
    """Keeps what it is given; `during` lets a test look in or raise."""

    title = "test"

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        self.seen: list[int] = []
        self.closed = False
        self._during = during

    def write(self, step: TrackedStep, event: MetricEvent) -> None:
        self.seen.append(event.at)
        self._during()

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        self.closed = True


def metric(at: int) -> MetricEvent:
    return MetricEvent(step="pretrain", name="train_loss", value=1.0, at=at)


def test_a_sink_gets_everything_in_order() -> None:
    sink, warned = Sink(), list[str]()
    thread = SinkThread(sink, warned.append)
    for at in range(1000):
        thread.put(STEP, metric(at))
    assert thread.close(60)
    assert (sink.seen, sink.closed, warned) == (list(range(1000)), True, [])


def test_a_failed_sink_is_one_warning() -> None:
    warned, told = list[str](), threading.Event()

    def fail() -> None:
        raise OSError("No space left on device")

    def warn(text: str) -> None:
        warned.append(text)
        told.set()

    sink = Sink(fail)
    thread = SinkThread(sink, warn)
    thread.put(STEP, metric(1))
    assert told.wait(60)
    thread.put(STEP, metric(2))
    assert thread.close(60)
    assert warned == ["test gets no more metrics: OSError: No space left on device; the run goes on without it"]
    assert (sink.seen, sink.closed) == ([1], False)


def test_a_sink_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_sink, "_WAITING", 5)
    hang, warned = threading.Event(), list[str]()
    thread = SinkThread(Sink(lambda: bool(hang.wait())), warned.append)
    for at in range(20):
        thread.put(STEP, metric(at))
    assert warned == ["test gets no more metrics: it is 5 values behind; the run goes on without it"]
    hang.set()
    assert thread.close(60)


def test_labels_are_part_of_a_curves_name() -> None:
    event = MetricEvent(step="s", name="train_mfu", value=1.0, labels={"b": "2", "a": "1"})
    assert curve_name(event) == "train_mfu/a-1/b-2"


RECIPE = """
name: r
tracking: {tracking}
steps:
  tokenizer: {{uses: load-tokenizer, with: {{package: x}}}}
"""


@pytest.mark.parametrize(
    ("tracking", "overrides", "message"),
    [
        ("{tensorbord: /tmp/a}", (), r"r\.yaml:3: tracking\.tensorbord: unknown field"),
        ("{wandb: {}}", (), r"tracking\.wandb\.project: field required"),
        ("", ("tracking.wandb.mode=x", "tracking.wandb.project=p"), "input should be 'online' or 'offline'"),
        ("{wandb: {project: p, api_key: plain-text}}", (), "a secret must be a reference"),
    ],
)
def test_mistakes_in_tracking_name_the_field(tracking: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(RECIPE.format(tracking=tracking), Path("r.yaml"), overrides)


def test_tracking_is_set_by_option_and_changes_no_result() -> None:
    plain = parse_recipe(RECIPE.format(tracking=""), Path("r.yaml"))
    made = parse_recipe(RECIPE.format(tracking=""), Path("r.yaml"), ("tracking.tensorboard=/tb",))
    assert (plain.tracking, made.tracking) == (Tracking(), Tracking(tensorboard=Path("/tb")))
    assert made.steps == plain.steps


def test_what_cannot_be_used_is_an_error_before_anything_starts(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(home.root / "none"))
    online = Tracking.model_validate({"wandb": {"project": "p"}})
    with pytest.raises(InputError, match=r"there is no key for api\.wandb\.ai") as no_key:
        run_curve(home, online, Curve(range(1, 2)))
    assert "WANDB_API_KEY" in no_key.value.hint
    (home.root / "file").write_text("")
    with pytest.raises(InputError, match=r"tracking\.tensorboard: .*: (Not a directory|File exists)"):
        run_curve(home, Tracking(tensorboard=home.root / "file"), Curve(range(1, 2)))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(InputError, match="the package wandb is not installed") as missing:
        run_curve(home, online, Curve(range(1, 2)))
    assert missing.value.hint == "pip install 'moray[wandb]'"
    assert not home.runs.exists()
