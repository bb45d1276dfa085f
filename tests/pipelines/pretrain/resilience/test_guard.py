"""Harmful batches are skipped, bad weights are rolled back, and losses end as in an undisturbed run."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moray.actors.data.token_set import Batch
from moray.models.anticipation import choose_experts
from moray.models.expert_parallel.interleave import run_alone
from moray.pipelines.pretrain.checkpoint import checkpoint_files
from moray.pipelines.pretrain.config import Spikes
from moray.pipelines.pretrain.loop import run_training
from moray.pipelines.pretrain.resilience.guard import RECORD, Guard, GuardRecord, read_record
from moray.pipelines.pretrain.train_step import drop, measure, micro_batches, take
from moray.pipelines.pretrain.worker import Worker
from moray.platform.core.events import EventLog, MetricEvent, NoteEvent, read_events
from tests.pipelines.pretrain.training_ranks import VOCABULARY, global_batch, held, lone_worker, skipping
from tests.ranks import RankPool

STEPS = 160
SETTINGS = {"steps": STEPS, "checkpoint_every": 40, "moments": "float32", "keep_checkpoints": 3}
SETTINGS |= {"schedule": {"peak": 1e-2, "final": 1e-3, "bias_speed": 1e-2}}


class Source:
    """Batches without delay; `spoil` may damage some of them."""

    def __init__(self, spoil: Callable[[int, Batch], Batch] = lambda step, batch: batch) -> None:
        self._spoil = spoil

    def request(self, step: int, start: int, stop: int) -> tuple[int, int, int]:
        return step, start, stop

    def receive(self, handle: tuple[int, int, int]) -> Batch:
        step, start, stop = handle
        whole = self._spoil(step, noisy_batch(step))
        return Batch(whole.ids[start:stop], whole.documents[start:stop], whole.mask[start:stop])


def noisy_batch(step: int) -> Batch:
    """A batch whose loss has a floor: one id in ten is drawn."""
    batch, generator = global_batch(step), np.random.default_rng(10_000 + step)
    drawn = generator.random(batch.ids.shape) < 0.1
    ids = np.where(drawn, generator.integers(0, VOCABULARY, drawn.shape), batch.ids)
    return Batch(ids, batch.documents, batch.mask)


def outlier(batch: Batch) -> Batch:
    """The same shape, ids that follow no rule."""
    generator = np.random.default_rng(1)
    return Batch(generator.integers(0, VOCABULARY, batch.ids.shape), batch.documents, batch.mask)


def trained(folder: Path, source: Source, worker: Worker | None = None) -> tuple[list[float], list[NoteEvent], Worker]:
    """(last loss of each step; notes; the worker)."""
    torch.set_num_threads(1)
    worker = worker or lone_worker(str(folder / "run"), **SETTINGS)
    with closing(EventLog(folder / "events", "test")) as events:
        run_training(worker, source, events)
    found = list(read_events(folder))
    losses = {e.at: e.value for e in found if isinstance(e, MetricEvent) and e.name == "train_loss"}
    return (
        [losses.get(at, math.nan) for at in range(1, STEPS + 1)],
        [e for e in found if isinstance(e, NoteEvent)],
        worker,
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The held-out loss of an undisturbed run."""
    losses, notes, worker = trained(tmp_path_factory.mktemp("clean"), Source())
    assert not notes
    assert not any(map(math.isnan, losses))
    return heldout(worker)


@torch.no_grad()
def heldout(worker: Worker) -> float:
    """The mean loss of 64 batches that are not in the training data."""
    losses = []
    for step in range(64):
        part = next(micro_batches(worker, noisy_batch(100_000 + step), step))
        terms = worker.model.training_loss(part.ids, part.targets, part.documents)
        losses.append((terms.main / terms.count).item())
    return float(np.mean(losses))


@pytest.mark.heavy
def test_an_outlier_is_skipped_in_its_own_step(tmp_path: Path, clean: float) -> None:
    source = Source(lambda step, batch: outlier(batch) if step == 60 else batch)
    losses, notes, worker = trained(tmp_path, source)
    assert [batch.step for batch in worker.state.guard.history.skipped] == [60]
    assert [math.isnan(loss) for loss in losses].count(True) == 1
    assert "the batch of step 61 is skipped: the loss is" in notes[0].text
    assert notes[0].level == "warning"
    assert read_record(tmp_path / "run").skipped == worker.state.guard.history.skipped
    assert heldout(worker) < 1.005 * clean


def bad_steps(losses: list[float]) -> list[int]:
    """The steps that are skipped or rolled back."""
    guard = Guard(Spikes(), GuardRecord())
    return [step for step, loss in enumerate(losses) if guard.decide(step, loss, 1.0) != "take"]


@given(st.integers(0, 1000))
def test_the_jitter_of_a_memorised_text_is_not_a_spike(seed: int) -> None:
    """Losses that fall towards zero, and now and then are ten or twenty times as large for a step."""
    generator = np.random.default_rng(seed)
    level = 0.5 * np.exp(-np.arange(400) / 80) + 1e-4
    jitter = np.exp(generator.standard_t(3, 400).clip(-4, 4) * 0.8)
    assert bad_steps(np.minimum(level * jitter, 0.75).tolist()) == []


@pytest.mark.parametrize(("level", "spike"), [(2.0, 2.2), (1.0, 1.1), (0.7, 1.0), (0.05, 0.9), (8.0, 8.8)])
def test_a_loss_far_above_is_a_spike_at_any_level(level: float, spike: float) -> None:
    steady = (level + 0.002 * np.sin(np.arange(40.0))).tolist()
    assert bad_steps([*steady, spike, *steady]) == [40]


def test_a_batch_without_a_target_is_skipped(tmp_path: Path) -> None:
    """Documents of one token, and padding, have no targets. Training continues, also after a resume."""
    length = global_batch(0).ids.shape[1]

    def spoilt(step: int, batch: Batch) -> Batch:
        if step == 2:
            return Batch(batch.ids, np.zeros_like(batch.documents) + np.arange(length, dtype=np.int32), batch.mask)
        return Batch(batch.ids, batch.documents, np.zeros_like(batch.mask)) if step == 4 else batch

    settings = {**SETTINGS, "steps": 6, "checkpoint_every": 3}
    worker = lone_worker(str(tmp_path), **settings)
    run_training(worker, Source(spoilt), None)
    record = read_record(tmp_path)
    assert (record.skipped, record.empty) == ([], [2, 4])
    assert worker.state.guard.taken(6) == 4, "Adam's bias correction counts steps that were taken"
    expected = held(worker)
    checkpoint_files.remove_checkpoint(tmp_path / "checkpoints", 6)
    again = lone_worker(str(tmp_path), **settings)
    run_training(again, Source(spoilt), None)
    assert all(np.array_equal(held(again)[key], expected[key]) for key in expected)


def test_an_empty_batch_does_not_count_as_a_spike() -> None:
    guard = Guard(Spikes(), GuardRecord())
    for step in range(40):
        guard.decide(step, 2.0 + 0.01 * (step % 2), 1.0)
    guard.record_empty(40)
    assert guard.decide(41, 9.0, 1.0) == "skip"
    assert not guard.anticipates(42)
    assert guard.taken(42) == 40


def test_training_that_never_learns_is_an_error(tmp_path: Path) -> None:
    source = Source(lambda step, batch: Batch(batch.ids, batch.documents, np.zeros_like(batch.mask)))
    with pytest.raises(ValueError, match="none of the 3 batches"):
        run_training(lone_worker(str(tmp_path), **{**SETTINGS, "steps": 3}), source, None)


@pytest.mark.evidence
def test_a_spike_that_returns_turns_on_routing_by_older_weights(tmp_path: Path, clean: float) -> None:
    source = Source(lambda step, batch: outlier(batch) if step in (50, 60) else batch)
    _, notes, worker = trained(tmp_path, source)
    history = worker.state.guard.history
    assert [batch.step for batch in history.skipped] == [50, 60]
    assert history.anticipated == (60, 160)
    assert "older weights" not in notes[0].text
    assert "older weights" in notes[1].text
    assert heldout(worker) < 1.005 * clean


@pytest.mark.heavy
def test_bad_weights_are_rolled_back(tmp_path: Path, clean: float) -> None:
    """A batch whose own loss is inconspicuous, but whose update spoils the weights."""
    worker = lone_worker(str(tmp_path / "run"), **SETTINGS)
    step_of, taken = worker.optimizer.step, [0]

    def spoiling(rate: float) -> None:
        step_of(rate)
        taken[0] += 1
        if taken[0] == 57:
            for fragment in worker.optimizer.fragments():
                if fragment.kind == "master":
                    fragment.tensor.mul_(3)

    worker.optimizer.step = spoiling  # type: ignore[method-assign]
    _, notes, _ = trained(tmp_path, Source(), worker)
    history = worker.state.guard.history
    assert [batch.step for batch in history.skipped] == [56], "the step after which losses were bad"
    assert history.rollbacks == 1
    assert [note.text for note in notes if "rolls back to step 40" in note.text]
    assert heldout(worker) < 1.005 * clean


def test_a_loss_that_is_not_finite_is_skipped_at_once(tmp_path: Path) -> None:
    worker = lone_worker(str(tmp_path), **SETTINGS)
    before = held(worker)
    hook = worker.model.model.norm.register_full_backward_hook(
        lambda module, grads, _: (grads[0] * math.inf, *grads[1:])
    )
    measured = measure(worker, global_batch(0), 0)
    assert worker.state.guard.decide(0, measured.loss, measured.norm) == "skip"
    drop(worker)
    hook.remove()
    after = held(worker)
    assert all(np.array_equal(before[key], after[key]) for key in before)
    clean = lone_worker(str(tmp_path), **SETTINGS)
    for one in (worker, clean):
        take(one, 1, measure(one, global_batch(1), 1))
    after, expected = held(worker), held(clean)
    assert all(np.array_equal(after[key], expected[key]) for key in after), "nothing of the skipped batch is left"


def test_a_run_that_is_bad_from_the_start_restarts_and_then_gives_up(tmp_path: Path) -> None:
    worker = lone_worker(str(tmp_path / "run"), **SETTINGS)
    worker.model.model.norm.register_forward_hook(lambda module, inputs, output: output * math.nan)
    with pytest.raises(FloatingPointError, match=r"restarts from the beginning.*lower schedule\.peak or clip"):
        trained(tmp_path, Source(), worker)
    assert read_record(tmp_path / "run").rollbacks == 1
    guard = Guard(Spikes(), GuardRecord(rollbacks=3))
    for step in range(3):
        decision = guard.decide(step, math.nan, 1.0)
    assert decision == "back"
    with pytest.raises(FloatingPointError, match="after 3 rollbacks"):
        guard.roll_back()


@pytest.mark.evidence
def test_a_resumed_run_skips_the_recorded_batches(tmp_path: Path) -> None:
    source = Source(lambda step, batch: outlier(batch) if step == 60 else batch)
    _, _, worker = trained(tmp_path, source)
    expected = held(worker)
    checkpoint_files.remove_checkpoint(tmp_path / "run" / "checkpoints", STEPS)
    again = lone_worker(str(tmp_path / "run"), **SETTINGS)
    assert again.checkpoints.restore(again.state).steps == STEPS - 40
    assert again.state.guard.taken(STEPS - 40) == STEPS - 41, "Adam's bias correction counts steps that were taken"
    # The source has no outlier, but its batch is skipped all the same.
    run_training(lone_worker(str(tmp_path / "run"), **SETTINGS), Source(), None)
    final_ = lone_worker(str(tmp_path / "run"), **SETTINGS)
    assert final_.checkpoints.restore(final_.state).steps == STEPS
    assert all(np.array_equal(held(final_)[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "settings", [{}, {"zero_stage": 1}, {"zero_stage": 2}, {"zero_stage": 1, "offload": True}], ids=str
)
def test_a_skipped_batch_leaves_nothing_behind_on_any_backend(ranks: RankPool, settings: dict[str, Any]) -> None:
    assert ranks.run(2, skipping, {"expert_parallel": 2, "micro_batch_sequences": 2, **settings}) == [True, True]


def test_routing_by_given_choices_changes_routing_only(tmp_path: Path) -> None:
    """With the choices that the weights make themselves, loss and gradients are the same to the bit."""
    worker = lone_worker(str(tmp_path), **SETTINGS)
    batch = global_batch(0)
    ids = torch.from_numpy(batch.ids)
    chosen = choose_experts(worker.model, ids, ids)
    assert len(chosen) == len(worker.model.routers())
    assert not worker.model.router_counts().any(), "choosing counts nothing"
    gradients = []
    for routes in (None, chosen):
        worker.model.zero_grad(set_to_none=False)
        terms = worker.model.training_loss(ids, ids, routes=routes)
        (terms.main + terms.balance).backward()
        gradients.append([p.grad.clone() for p in worker.model.parameters() if p.grad is not None])
        counts = worker.model.router_counts()
        worker.model.reset_counters()
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    # In the layer of prediction, each sequence's last place does not count.
    places = len(chosen) * ids.numel() - len(ids) * worker.job.model.num_nextn_predict_layers
    assert int(counts.sum()) == places * worker.job.model.num_experts_per_tok
    other = [(ids_TK + 1) % worker.job.model.n_routed_experts for ids_TK in chosen]
    moved, routings = run_alone(worker.model.routed_parts(ids, ids, routes=other))
    assert moved.main != terms.main
    assert all(torch.equal(a.ids_TK, b) for a, b in zip(routings, other, strict=True))
    with pytest.raises(ValueError, match="shorter"):
        worker.model.training_loss(ids, ids, routes=other[1:])


@given(st.lists(st.floats(1.9, 2.1), min_size=64, max_size=64), st.floats(0, 0.3), st.integers(0, 2**31))
def test_noise_and_trends_are_not_spikes(noise: list[float], fall: float, seed: int) -> None:
    guard = Guard(Spikes(), GuardRecord())
    for step, value in enumerate(noise):
        assert guard.decide(step, value + fall * (64 - step) / 8, 1.0) == "take"
    assert guard.decide(64, 100.0, 1.0) == "skip"
    assert guard.decide(65, 2.0, 1.0) == "take"


def test_without_sigmas_only_non_finite_losses_count() -> None:
    guard = Guard(Spikes(sigmas=None), GuardRecord())
    for step in range(64):
        guard.decide(step, 2.0, 1.0)
    assert guard.decide(64, 1e9, 1.0) == "take"
    assert guard.decide(65, math.inf, 1.0) == "skip"


def test_the_record_is_next_to_the_checkpoints(tmp_path: Path) -> None:
    assert read_record(tmp_path) == GuardRecord()
    guard = Guard(Spikes(), GuardRecord())
    guard.decide(3, math.nan, 1.0)
    guard.write(tmp_path)
    assert (tmp_path / RECORD).exists()
    assert read_record(tmp_path) == guard.history
