from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest

from moray.platform.control.database import Database
from moray.platform.control.jobs import Job, Jobs, Submission
from moray.platform.core.events import (
    Event,
    EventLog,
    MetricEvent,
    NoteEvent,
    ProgressEvent,
    RunEvent,
    ScoreEvent,
    StepEvent,
)
from moray.platform.core.home import Home
from moray.platform.core.metrics import TABLE
from moray.platform.server.curves import MOST_POINTS, Curve
from moray.platform.server.run_state import EXPERT_LOAD, RunViews, run_view

RECIPE = """
name: small
steps:
  corpus:
    with: {sources: [{name: here, path: ".", include: ["*.txt"], license: none}]}
  filter: {inputs: {documents: corpus}}
  again: {uses: filter, inputs: {documents: filter}}
"""


class Control:
    """A job with one running attempt, and its event log."""

    def __init__(self, home: Home) -> None:
        self.home = home
        (home.root / "one.txt").write_text("a document")
        self.jobs = Jobs(Database(home.database))
        self.id = self.jobs.submit(Submission(recipe=RECIPE, folder=str(home.root)))[0].id
        self.views = RunViews(home)

    @property
    def job(self) -> Job:
        return self.jobs.get(self.id)

    def start(self) -> EventLog:
        attempt = self.jobs.new_attempt(self.id)
        self.jobs.move_attempt(attempt.id, "running")
        self.jobs.move(self.id, "running")
        return self.log("runner")

    def log(self, writer: str) -> EventLog:
        assert self.job.latest is not None
        return EventLog(self.home.runs / self.job.latest.id / "events", writer)

    def segment(self, log: EventLog) -> Path:
        return log.folder / f"{log.writer}.jsonl"


@pytest.fixture
def control(home: Home) -> Control:
    return Control(home)


def step(key: str, state: str, **values: object) -> Event:
    return StepEvent.model_validate({"step": key, "state": state, "fingerprint": "f" * 64, **values})


def say(log: EventLog, *events: Event) -> None:
    for event in events:
        log.append(event)


def loss(at: int, value: float) -> MetricEvent:
    return MetricEvent(step="again", name="train_loss", value=value, at=at)


def test_a_job_that_never_began_shows_its_recipe(control: Control) -> None:
    view = run_view(control.home, control.job)
    assert (view["state"], view["attempt"], view["curves"], view["expert_load"]) == ("pending", None, {}, None)
    assert [(s["key"], s["uses"], s["inputs"], s["state"]) for s in view["steps"]] == [
        ("corpus", "corpus", {}, "pending"),
        ("filter", "filter", {"documents": "corpus"}, "pending"),
        ("again", "filter", {"documents": "filter"}, "pending"),
    ]


def test_an_attempt_without_a_folder_or_with_an_empty_segment_is_pending(control: Control) -> None:
    attempt = control.jobs.new_attempt(control.id)
    assert control.views.view(control.job)["attempt"] == attempt.id
    control.log("runner").close()
    assert control.views.view(control.job)["state"] == "pending"
    with pytest.raises(KeyError):
        control.views.view(control.job, "no such attempt")


def test_steps_have_the_values_of_their_events(control: Control) -> None:
    log = control.start()
    say(
        log,
        RunEvent(state="started", recipe="small"),
        step("corpus", "reused", why="have ffff", counts={"out:documents": 3.0}, outcome="3 kept"),
        step("filter", "started", why="never run"),
        NoteEvent(step="filter", level="warning", text="slow disk"),
        ScoreEvent(step="filter", task="letters", metric="acc", value=0.5, n=12, interval=(0.2, 0.8)),
        ScoreEvent(step="filter", task="letters", metric="acc", value=0.6, n=12),
        ProgressEvent(step="filter", phase="filtering", done=2, total=8, unit="documents"),
    )
    view = control.views.view(control.job)
    corpus, current, pending = view["steps"]
    assert view["state"] == "started"
    assert (corpus["state"], corpus["why"], corpus["outcome"], corpus["counts"]) == (
        "reused",
        "have ffff",
        "3 kept",
        {"out:documents": 3.0},
    )
    assert (current["state"], current["why"], current["notes"][0]["text"]) == ("started", "never run", "slow disk")
    assert current["scores"] == [{"task": "letters", "metric": "acc", "value": 0.6, "n": 12, "interval": None}]
    assert current["progress"]["done"] == 2
    assert current["progress"]["rate"] is None, "one report makes no rate"
    assert pending["state"] == "pending"
    say(log, ProgressEvent(step="filter", phase="filtering", done=4, total=8, unit="documents"))
    progress = control.views.view(control.job)["steps"][1]["progress"]
    assert progress["rate"] > 0
    assert progress["eta"] == pytest.approx(4 / progress["rate"])
    assert control.views.brief(control.job) == {"done": 1, "steps": 3, "step": "filter", "progress": progress}
    say(log, step("filter", "succeeded", seconds=1.5, outcome="all"), RunEvent(state="succeeded", recipe="small"))
    view = control.views.view(control.job)
    filtered = view["steps"][1]
    assert (view["state"], filtered["state"], filtered["why"], filtered["seconds"]) == (
        "succeeded",
        "succeeded",
        "never run",
        1.5,
    )
    assert filtered["progress"] is None


def test_a_step_of_an_attempt_that_died_is_lost(control: Control) -> None:
    log = control.start()
    say(log, RunEvent(state="started", recipe="small"), step("corpus", "started"))
    assert control.job.latest is not None
    control.jobs.move_attempt(control.job.latest.id, "lost", "its driver is gone")
    view = control.views.view(control.job)
    assert (view["state"], view["detail"], view["steps"][0]["state"]) == ("lost", "its driver is gone", "lost")


def test_unknown_and_torn_lines_are_counted_and_the_rest_is_shown(control: Control) -> None:
    log = control.start()
    say(log, RunEvent(state="started", recipe="small"))
    with control.segment(log).open("ab") as file:
        file.write(b'{"kind": "step", "step": "corpus", "shape": "of another version"}\nnot JSON\n')
    say(log, step("corpus", "started"))
    with control.segment(log).open("ab") as file:
        file.write(b'{"kind": "step", "step": "cor')
    view = control.views.view(control.job)
    assert (view["unreadable"], view["steps"][0]["state"]) == (2, "started")


def test_a_poll_reads_only_new_events_and_equals_a_full_read(control: Control) -> None:
    log = control.start()
    say(log, RunEvent(state="started", recipe="small"), step("again", "started"), loss(1, 8.0))
    control.views.view(control.job)
    control.segment(log).write_bytes(b" " * control.segment(log).stat().st_size)  # what was read is not needed again
    say(log, loss(2, 7.0))
    assert control.views.view(control.job)["curves"] == {"train_loss": [[1, 8.0], [2, 7.0]]}


def test_the_order_of_segments_does_not_matter(control: Control) -> None:
    runner, first = control.start(), control.log("train-0-z")
    say(runner, RunEvent(state="started", recipe="small"), step("again", "started"))
    say(first, loss(1, 9.0), loss(2, 8.5))
    say(control.log("train-0-a"), loss(2, 8.0), loss(3, 7.0))  # read first, written last
    curves = run_view(control.home, control.job)["curves"]
    assert curves["train_loss"] == [[1, 9.0], [2, 8.0], [3, 7.0]]


def test_curves_come_loss_and_throughput_first_with_units(control: Control) -> None:
    log = control.start()
    for name in ("train_learning_rate", "train_tokens_per_second", "train_loss"):
        say(log, MetricEvent(step="again", name=name, value=1.0, at=1))
    say(log, MetricEvent(step="eval", name="eval_bits_per_byte", value=2.5, labels={"source": "all", "model": "m"}))
    view = control.views.view(control.job)
    assert list(view["curves"]) == ["train_loss", "train_tokens_per_second", "train_learning_rate"]
    assert view["metrics"]["train_loss"]["unit"] == "nats/token"
    assert view["figures"] == {"eval_bits_per_byte/m/all": 2.5}
    assert view["metrics"]["eval_bits_per_byte"]["unit"] == "bits/byte"
    assert view["titles"] == {
        "train_loss": "Loss",
        "train_tokens_per_second": "Throughput",
        "train_learning_rate": "Learning rate",
        "eval_bits_per_byte/m/all": "Held-out bits per byte (m, all)",
    }
    say(log, MetricEvent(step="filter", name="train_loss", value=3.0, at=1))
    view = control.views.view(control.job)
    assert list(view["curves"])[:2] == ["train_loss/again", "train_loss/filter"]
    assert view["titles"]["train_loss/filter"] == "Loss · filter"


def test_every_metric_has_a_title_and_a_unit(control: Control) -> None:
    log = control.start()
    for row in TABLE.values():
        for at in (0, 1):
            labels = dict.fromkeys(row.labels, "1")
            say(log, MetricEvent(step="again", name=row.name, value=1.0, at=at, labels=labels))
    view = control.views.view(control.job)
    shown = {*view["curves"], *view["figures"]}
    assert {name.partition("/")[0] for name in shown} == set(TABLE) - {EXPERT_LOAD}
    for name in shown:
        row = TABLE[name.partition("/")[0]]
        assert view["titles"][name].startswith(row.label)
        assert view["metrics"][row.name] == {
            "label": row.label, "unit": row.unit, "help": row.help, "digits": row.digits,
        }  # fmt: skip


def test_a_metric_of_another_version_has_a_readable_title(control: Control) -> None:
    log = control.start()
    with control.segment(log).open("a") as file:
        file.write(MetricEvent(step="again", name="reward_mean", value=1.0, at=3).model_dump_json() + "\n")
    view = control.views.view(control.job)
    assert view["titles"] == {"reward_mean": "Reward mean"}
    assert view["metrics"]["reward_mean"]["unit"] == ""


def test_expert_load_is_a_row_of_layers_for_each_step(control: Control) -> None:
    log = control.start()
    for at in (10, 20):
        for layer in (1, 2):
            if (at, layer) != (20, 2):
                labels = {"layer": str(layer)}
                say(log, MetricEvent(step="again", name="train_expert_load", value=at / layer, at=at, labels=labels))
    view = control.views.view(control.job)
    assert view["expert_load"] == {
        "steps": [10, 20],
        "layers": [1, 2],
        "values": [[10.0, 5.0], [20.0, None]],
        "what": "max/mean load",
    }
    assert view["curves"] == {}


def test_curves_of_a_long_run_are_thinned_and_keep_ends_and_extremes(control: Control) -> None:
    log = control.start()
    lines = []
    for at in range(1, 20_001):
        value = {7: 99.0, 13_333: -5.0}.get(at, 1.0 + at % 10)
        lines.append(loss(at, value).model_copy(update={"sequence": at, "time": float(at)}).model_dump_json())
        if at % 20 == 0:
            load = MetricEvent(step="again", name="train_expert_load", value=1.0, at=at, labels={"layer": "1"})
            lines.append(load.model_copy(update={"time": float(at)}).model_dump_json())
    control.segment(log).write_text("\n".join(lines) + "\n")
    view = control.views.view(control.job)
    curve = view["curves"]["train_loss"]
    assert len(curve) <= MOST_POINTS
    assert (curve[0], curve[-1]) == ([1, 2.0], [20_000, 1.0])
    assert [7, 99.0] in curve
    assert [13_333, -5.0] in curve
    assert curve == sorted(curve)
    assert len(view["expert_load"]["steps"]) <= 250
    assert view["expert_load"]["steps"][-1] == 20_000


def test_non_finite_values_are_null_on_the_page(control: Control) -> None:
    log = control.start()
    say(
        log, loss(1, 8.0), loss(2, float("nan")), loss(3, float("inf")), step("again", "failed", counts={"x": math.nan})
    )
    view = control.views.view(control.job)
    assert (view["unreadable"], view["curves"]["train_loss"]) == (0, [[1, 8.0], [2, None], [3, None]])
    json.dumps(view, allow_nan=False)


def test_a_curve_counts_a_position_once() -> None:
    curve = Curve()
    curve.add(5, 2.0, time=20.0)
    curve.add(5, 1.0, time=10.0)
    assert curve.points() == [[5, 2.0]]


def test_many_threads_read_one_run_that_grows(control: Control) -> None:
    log = control.start()
    seen: list[int] = []

    def read() -> None:
        for _ in range(20):
            seen.append(len(control.views.view(control.job)["curves"].get("train_loss", [])))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for at in range(1, 301):
        say(log, loss(at, 1.0))
    for thread in threads:
        thread.join()
    assert len(seen) == 80
    assert len(control.views.view(control.job)["curves"]["train_loss"]) == 300
