"""Ranks are compared by their busy times, and those that stay slow are named once, with their hosts."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moray.actors.data.token_set import Batch
from moray.pipelines.pretrain import stopwatch
from moray.pipelines.pretrain.config import Stragglers
from moray.pipelines.pretrain.loop import run_training
from moray.pipelines.pretrain.stopwatch import Stopwatch
from moray.pipelines.pretrain.stragglers import BusyTimer, StragglerWatch, slowest_rank
from moray.pipelines.pretrain.streaks import Streaks
from moray.platform.core.events import EventLog, MetricEvent, NoteEvent, ProgressEvent, read_events
from tests.pipelines.pretrain.training_ranks import global_batch, toy_worker
from tests.ranks import RankPool

RULES = Stragglers(excess=0.5, reports=3)
times = st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=40)


@given(times, st.floats(1e-3, 1e3))
def test_the_slowest_rank_is_the_maximum_over_the_median(busy_R: list[float], unit: float) -> None:
    found, scaled = slowest_rank(busy_R), slowest_rank([unit * seconds for seconds in busy_R])
    assert found is not None
    assert scaled is not None
    assert found.seconds == busy_R[found.rank] == max(busy_R)
    assert sum(seconds <= found.median for seconds in busy_R) * 2 >= len(busy_R)
    assert found.excess >= 0
    assert scaled.excess == pytest.approx(found.excess, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("busy_R", [[], [1.0], [0.0, 0.0], [0.0, 0.0, 5.0]])
def test_there_is_nothing_to_compare(busy_R: list[float]) -> None:
    assert slowest_rank(busy_R) is None
    assert StragglerWatch(RULES, ["host"] * len(busy_R)).update(busy_R) == (None, "")


@given(st.integers(1, 4), st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=40))
def test_a_condition_is_announced_once_per_streak(length: int, history: list[list[bool]]) -> None:
    streaks = Streaks(3, length)
    announced = [streaks.update(np.array(holds)) for holds in history]
    for n in range(3):
        column, last = [holds[n] for holds in history], None
        for at in range(len(history)):
            persists = at + 1 >= length and all(column[at + 1 - length : at + 1])
            cleared = last is None or any(
                not any(column[begin : begin + length]) for begin in range(last, at + 1 - length)
            )
            expected = persists and cleared
            assert (n in announced[at]) == expected
            last = at if expected else last


def test_one_warning_names_the_slow_ranks_of_a_host_among_2048() -> None:
    watch = StragglerWatch(RULES, [f"host-{rank // 8}" for rank in range(2048)])
    busy_R = np.full(2048, 1.0)
    busy_R[80:88] = 2.0
    warnings = []
    for report in range(10):
        busy_R[80 + report % 8] = 2.5  # they take turns at being the slowest
        slowest, warning = watch.update(busy_R.tolist())
        busy_R[80 + report % 8] = 2.0
        assert slowest is not None
        assert (slowest.rank, slowest.excess) == (80 + report % 8, 1.5)
        assert watch.exceeds(slowest)
        warnings.append(warning)
    assert [bool(warning) for warning in warnings] == [False, False, True] + 7 * [False]
    assert warnings[2].startswith(
        "slow for 3 comparisons in a row: rank 82 on host-10 (+150%), rank 80 on host-10 (+100%)"
    )


def test_a_warning_names_eight_ranks_and_counts_the_others() -> None:
    watch = StragglerWatch(Stragglers(excess=0.5, reports=1), ["host"] * 100)
    _, warning = watch.update([3.0] * 20 + [1.0] * 80)
    assert warning.count("rank ") - warning.count("median rank ") == 8
    assert "and 12 more" in warning


class _Span:
    """An event of a device that runs behind the host."""

    reached = 0  # seconds of the device's time
    issued = 0

    def record(self) -> None:
        _Span.issued += 1
        self.at = _Span.issued

    def query(self) -> bool:
        return self.at <= _Span.reached

    def synchronize(self) -> None:
        _Span.reached = max(_Span.reached, self.at)

    def elapsed_time(self, end: _Span) -> float:
        return 1e3 * (end.at - self.at)


def test_the_total_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "runtime", lambda device: SimpleNamespace(event=_Span))
    monkeypatch.setattr(_Span, "reached", 0)
    monkeypatch.setattr(_Span, "issued", 0)
    clock = Stopwatch()
    for _ in range(3):
        with clock.over(torch.device("meta")):
            pass
    assert clock.total() == 0
    _Span.reached = 3  # the end of the first span, the begin of the second
    assert clock.total() == clock.total() == 1
    assert clock.take() == 3
    assert (clock.take(), clock.total()) == (0, 3)


def test_the_first_step_is_not_counted_and_every_report_starts_again() -> None:
    timer = BusyTimer(Stopwatch(), every=5)
    with timer.step(waited=1e6):
        pass
    assert [timer.due(step) is None for step in range(4, 11)] == [True, False, True, True, True, True, False]
    for waited in (100.0, 300.0):
        with timer.step(waited):
            pass
    assert timer.due(15) == pytest.approx(200, rel=0.05)
    assert timer.due(20) == 0


class _Batches:
    """Batches for every rank at once."""

    def request(self, step: int, start: int, stop: int) -> tuple[int, int, int]:
        return step, start, stop

    def receive(self, handle: tuple[int, int, int]) -> Batch:
        step, start, stop = handle
        whole = global_batch(step)
        return Batch(whole.ids[start:stop], whole.documents[start:stop], whole.mask[start:stop])


def train_with_a_slow_rank(folder: str) -> None:
    """Rank 1 of two reports three times the busy time of rank 0."""
    rank = dist.get_rank()
    worker = toy_worker(
        f"{folder}/run",
        steps=8,
        expert_parallel=2,
        ema_half_life_tokens=None,
        resilience={"stragglers": {"every": 2, "excess": 0.4, "reports": 2}},
    )
    with pytest.MonkeyPatch.context() as patch, closing(EventLog(Path(folder) / "events", f"rank-{rank}")) as events:
        patch.setattr(BusyTimer, "due", lambda self, step: None if step % 2 else 1.0 + 2 * rank)
        run_training(worker, _Batches(), events if rank == 0 else None)


def test_rank_0_reports_the_times_of_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, train_with_a_slow_rank, str(tmp_path))
    found = read_events(tmp_path)

    def values(name: str, **labels: str) -> list[Any]:
        return [(e.at, e.value) for e in found if isinstance(e, MetricEvent) and (e.name, e.labels) == (name, labels)]

    assert values("train_slowest_rank") == [(at, 1) for at in (1, 3, 5, 7)]
    assert values("train_slowest_rank_excess") == [(at, 0.5) for at in (1, 3, 5, 7)]
    assert values("train_busy_seconds", rank="slowest") == [(at, 3) for at in (1, 3, 5, 7)]
    assert values("train_busy_seconds", rank="median") == [(at, 2) for at in (1, 3, 5, 7)]
    warnings = [e.text for e in found if isinstance(e, NoteEvent) and e.level == "warning"]
    assert len(warnings) == 1
    assert "rank 1 on " in warnings[0]
    assert "rank 1 on " in [e for e in found if isinstance(e, ProgressEvent)][-1].detail
