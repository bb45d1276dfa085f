"""The held-out loss: the same in every layout, by source, and without effect on training; and losses by source."""

from __future__ import annotations

import dataclasses
import gzip
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moray.actors.data.held_out import HeldOutPlan
from moray.actors.data.token_set import Batch
from moray.pipelines.pretrain.loop import run_training
from moray.platform.core.events import EventLog, MetricEvent, NoteEvent, read_events
from tests.pipelines.pretrain.training_ranks import held_out_while_training, lone_worker, sourced_batch, with_sources
from tests.ranks import RankPool


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50)), st.integers(1, 20), st.data())
def test_slots_are_evenly_spaced_sequences_of_each_source(stored: dict[str, int], most: int, data: Any) -> None:
    plan = HeldOutPlan.of("unused", stored, most)
    assert dict(zip(plan.sources, plan.stored, strict=True)) == {name: n for name, n in sorted(stored.items()) if n}
    assert plan.slots == sum(min(n, most) for n in stored.values())
    sources, numbers = plan.sequences(0, plan.slots)
    for index, n in enumerate(plan.stored):
        mine = numbers[sources == index]
        assert len(mine) == min(n, most)
        assert mine.tolist() == [i * n // len(mine) for i in range(len(mine))]
        assert len(set(mine)) == len(mine)
    start = data.draw(st.integers(0, plan.slots))
    stop = data.draw(st.integers(start, plan.slots))
    for whole, part in zip((sources, numbers), plan.sequences(start, stop), strict=True):
        assert whole[start:stop].tolist() == part.tolist()


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks_", "settings"),
    [
        (2, {"expert_parallel": 2}),
        (4, {"expert_parallel": 4, "zero_stage": 3, "micro_batch_sequences": 1, "recompute": "layer"}),
        (4, {"expert_parallel": 2, "zero_stage": 2, "micro_batch_sequences": 2}),
    ],
)
def test_it_does_not_depend_on_the_layout_and_changes_no_training(
    ranks: RankPool, ranks_: int, settings: dict[str, Any]
) -> None:
    settings = {"precision": "float64" if not settings.get("zero_stage") else "float32", **settings}
    ((alone, quiet),) = ranks.run(1, held_out_while_training, {"precision": settings["precision"]})
    for found, losses in ranks.run(ranks_, held_out_while_training, settings):
        for one, other in zip(found, alone, strict=True):
            assert one.sources.keys() == other.sources.keys() == {"even", "odd"}
            np.testing.assert_allclose(list(one.sources.values()), list(other.sources.values()), rtol=2e-5)
            np.testing.assert_allclose(one.total, other.total, rtol=2e-5)
        np.testing.assert_allclose(losses, quiet, rtol=2e-5)


class Source:
    """Batches of two sources."""

    def request(self, step: int, start: int, stop: int) -> tuple[int, int, int]:
        return step, start, stop

    def receive(self, handle: tuple[int, int, int]) -> Batch:
        step, start, stop = handle
        return with_sources(sourced_batch(step), start, stop)

    def held_out(self, plan: HeldOutPlan, start: int, stop: int) -> Batch:
        return with_sources(sourced_batch(1000), start, stop)


@pytest.mark.heavy
def test_a_run_reports_losses_by_source_and_held_out_ones_and_writes_a_trace(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    found: dict[bool, list[Any]] = {}
    for evaluates in (False, True):
        folder = tmp_path / str(evaluates)
        more = {"evaluate_every": 4, "profile": {"steps": [2, 3]}} if evaluates else {}
        worker = lone_worker(str(folder / "run"), steps=10, **more)
        plan = HeldOutPlan.of("unused", {"even": 4, "odd": 4}, most=64)
        worker.job = dataclasses.replace(worker.job, sources=("even", "odd"), held_out=plan)
        with closing(EventLog(folder / "events", "test")) as events:
            run_training(worker, Source(), events)
        found[evaluates] = list(read_events(folder))
    metrics = [event for event in found[True] if isinstance(event, MetricEvent)]
    losses = {
        evaluates: [e.value for e in events if isinstance(e, MetricEvent) and e.name == "train_loss"]
        for evaluates, events in found.items()
    }
    assert losses[True] == losses[False]
    held_out = [(e.at, e.labels["source"]) for e in metrics if e.name == "train_heldout_loss"]
    assert held_out == [(at, source) for at in (4, 8, 10) for source in ("all", "even", "odd")]
    by_source = {e.labels["source"]: e.value for e in metrics if e.name == "train_loss_by_source"}
    assert by_source.keys() == {"even", "odd"}
    assert min(losses[True]) - 0.5 < min(by_source.values()) <= max(by_source.values()) < max(losses[True]) + 0.5
    (trace,) = (tmp_path / "True" / "run" / "profile").iterdir()
    assert trace.name == "rank-00000-steps-2-3.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "aten::mm" in names
    assert f"profile: {trace}" in [e.text for e in found[True] if isinstance(e, NoteEvent)]
