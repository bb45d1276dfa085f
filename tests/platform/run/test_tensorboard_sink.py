"""Curves as TensorBoard itself reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from moray.platform.core.events import MetricEvent
from moray.platform.core.home import Home
from moray.platform.plan.tracking import Tracking
from moray.platform.run.tensorboard_sink import TensorBoardSink
from tests.platform.run.test_tracker import STEP, Curve, run_curve, warnings

Points = list[tuple[int, float]]


def curves(folder: Path) -> dict[str, Points]:
    """By tag, the points that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (found,) = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    read = EventAccumulator(str(found), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def loss(first: int, last: int, value: float = 1.0) -> Points:
    return [(at, value) for at in range(first, last)]


def written(sink: TensorBoardSink, points: Points, name: str = "train_loss") -> None:
    for at, value in points:
        sink.write(STEP, MetricEvent(step="pretrain", name=name, value=value, at=at, time=1.0))


def test_a_resumed_run_continues_the_curves(home: Home, tmp_path: Path) -> None:
    tracking = Tracking(tensorboard=tmp_path / "tb")
    live: dict[str, Points] = {}
    sink_closed = Curve(range(1, 9), fails=True)
    assert warnings(run_curve(home, tracking, sink_closed)) == []
    live |= curves(tmp_path / "tb")
    assert live["train_loss"] == [(at, 10.0 - at) for at in range(1, 9)]
    assert live["train_expert_load/layer-3"] == [(at, 1.0) for at in range(1, 9)]
    run_curve(home, tracking, Curve(range(5, 13)))
    again = curves(tmp_path / "tb")
    assert again["train_loss"] == [(at, 10.0 - at) for at in range(1, 13)]
    assert again["train_expert_load/layer-3"] == [(at, 1.0) for at in range(1, 13)]
    (folder,) = (tmp_path / "tb" / "tracked").iterdir()
    assert folder.name.startswith("pretrain-")
    assert len(list(folder.iterdir())) == 2


def test_values_are_visible_while_the_run_runs(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    written(sink, loss(1, 4))
    sink.flush()
    assert curves(tmp_path)["train_loss"] == loss(1, 4)
    written(sink, loss(4, 5))
    sink.close()
    assert curves(tmp_path)["train_loss"] == loss(1, 5)


def test_a_rollback_withdraws_what_it_repeats(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    written(sink, loss(1, 8))
    written(sink, [(4, 2.0)], "train_checkpoint_seconds")  # a save that ended later
    written(sink, [(8, 1.0)], "train_rollbacks")
    written(sink, loss(5, 10, 3.0))
    sink.close()
    found = curves(tmp_path)
    assert found["train_loss"] == loss(1, 5) + loss(5, 10, 3.0)
    assert found["train_checkpoint_seconds"] == [(4, 2.0)]
    assert found["train_rollbacks"] == [(5, 1.0)], "reported once, so it is kept"


def test_a_step_without_training_starts_again(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        sink = TensorBoardSink(tmp_path)
        written(sink, [(0, value)], "eval_bits_per_byte")
        written(sink, [(0, value)], "eval_accuracy")
        sink.close()
    assert curves(tmp_path) == {"eval_bits_per_byte": [(0, 2.0)], "eval_accuracy": [(0, 2.0)]}


def test_a_sink_that_fails_leaves_the_run_alone(home: Home, tmp_path: Path) -> None:
    (tmp_path / "tb" / "tracked").parent.mkdir()
    (tmp_path / "tb" / "tracked").write_text("in the way")
    events = run_curve(home, Tracking(tensorboard=tmp_path / "tb"), Curve(range(1, 9)))
    (text,) = warnings(events)
    assert text.startswith("TensorBoard gets no more metrics: ")
    assert text.endswith("; the run goes on without it")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_of_the_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboardX import record_writer

    monkeypatch.setattr(record_writer, "open_file", lambda path: Path("/dev/full").open("wb"))  # noqa: SIM115
    sink = TensorBoardSink(tmp_path)
    written(sink, loss(1, 4))
    with pytest.raises(OSError, match="No space left on device"):
        sink.flush()
