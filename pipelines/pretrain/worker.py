"""What one training worker does: Ray Train starts it on every rank with the same `Job`.

The loop is the same for any layout. The position is a step count; batch, learning rate and bias speed are functions
of it, so going on from a checkpoint needs nothing but the checkpoint. Losses are summed, not averaged, until the
optimizer divides by the global number of tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moray.actors.batch_plan import BatchPlan
from moray.actors.token_set import Batch
from moray.kernels.host_memory import keep_freed_memory
from moray.models.balance import update_router_biases
from moray.models.checkpoint import Checked, load_weights
from moray.models.dispatch import LocalDispatcher, ProcessGroupDispatcher
from moray.models.layer import Dispatcher
from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.archive import Archive
from moray.pipelines.pretrain.checkpoint import CheckpointFailed, Checkpoints
from moray.pipelines.pretrain.config import Job
from moray.pipelines.pretrain.ema import Ema
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.optimizer import ShardedOptimizer, sharded_optimizer
from moray.pipelines.pretrain.report import Report
from moray.pipelines.pretrain.schedule import batch_plan, bias_speed, learning_rate, prediction_weight
from moray.pipelines.pretrain.state import TrainingState
from moray.platform.events import EventLog

_IGNORED = -100


@dataclass
class Worker:
    """One rank's training state."""

    job: Job
    mesh: Mesh
    device: torch.device
    state: TrainingState
    checkpoints: Checkpoints
    loaders: list[Any]

    @property
    def model(self) -> DeepseekV3:
        return self.state.model

    @property
    def optimizer(self) -> ShardedOptimizer:
        return self.state.optimizer

    @cached_property
    def plan(self) -> BatchPlan:
        return batch_plan(self.job.config, self.job.sequence_length)

    @property
    def total_tokens(self) -> int:
        return self.tokens_before(self.job.config.steps)

    def tokens_before(self, step: int) -> int:
        """Tokens, padding included, of all steps before this one."""
        return self.plan.before(step) * self.job.sequence_length

    def slots(self, step: int) -> tuple[int, int]:
        """The slots of a step's global batch that are this rank's."""
        each = self.plan.size(step) // self.mesh.world
        return self.mesh.rank * each, (self.mesh.rank + 1) * each


def train(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker: `settings` is {"job": Job, "loaders": [DataWorker handles]}."""
    import ray.train.torch

    job: Job = settings["job"]
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    device = ray.train.torch.get_device()
    worker = build(job, Mesh.create(job.config.expert_parallel, device), device, settings["loaders"])
    events = EventLog(Path(job.events), f"train-{worker.mesh.rank}") if worker.mesh.rank == 0 else None
    run(worker, events)
    if events:
        events.close()


def build(job: Job, mesh: Mesh, device: torch.device, loaders: list[Any]) -> Worker:
    """The rank's model, initialised independently of the layout, with its optimizer and checkpoints."""
    dispatcher: Dispatcher = LocalDispatcher(job.model.n_routed_experts)
    if mesh.ep > 1:
        assert mesh.ep_group is not None
        dispatcher = ProcessGroupDispatcher(mesh.ep_group, job.model.n_routed_experts)
    model = DeepseekV3(job.model, mesh.experts(job.model.n_routed_experts), dispatcher).to(device)
    if job.initial is None:
        model.init_weights(job.config.seed)
    else:
        load_weights(model, Checked(job.initial))
    if job.config.precision == "float64":
        model.double()
    model.train()
    model.set_recompute(job.config.recompute)
    if job.config.precision in ("bf16", "fp8"):
        model.compute_in(torch.bfloat16)
    if job.config.precision == "fp8":
        model.train_in_fp8()
    folder, config = Path(job.folder) / "checkpoints", job.config
    archive = None
    if config.archive:
        archive = Archive(config.archive, Path(job.folder).name, folder, (mesh.rank, mesh.world))
    checkpoints = Checkpoints(folder, mesh, config.keep_checkpoints, config.keep_checkpoint_hours, archive)
    optimizer = sharded_optimizer(model, mesh, config)
    ema = Ema(optimizer, config.ema_half_life_tokens) if config.ema_half_life_tokens else None
    return Worker(job, mesh, device, TrainingState(model, optimizer, ema), checkpoints, loaders)


def run(worker: Worker, events: EventLog | None) -> None:
    """Trains to the last step, from the newest checkpoint if there is one. `events` is given on rank 0 only.

    Raises CheckpointFailed if the last checkpoint, which is what training is for, cannot be written.
    """
    job, checkpoints = worker.job, worker.checkpoints
    restored = checkpoints.restore(worker.state)
    tokens = restored.tokens
    report = Report(job, worker.total_tokens, events, tokens)
    for text in restored.warnings:
        report.note(text, "warning")
    if restored.steps:
        whence = ", fetched from the archive" if restored.fetched else ""
        report.note(f"going on from the checkpoint at step {restored.steps}{whence}")
    for step, batch, waited in batches(worker, restored.steps, job.config.steps):
        figures, load_L = train_step(worker, batch, tokens)
        tokens = worker.tokens_before(step + 1)
        report.add(step + 1, tokens, figures, load_L, waited)
        last = step + 1 == job.config.steps
        if last or (step + 1) % job.config.checkpoint_every == 0:
            checkpoints.save(worker.state, step + 1, tokens)
        report.saved(checkpoints.ended())
        report.archived(checkpoints.archived())
    checkpoints.wait()
    ended = checkpoints.ended()
    report.saved(ended)
    report.archived(checkpoints.archived(last=True))
    if ended and ended[-1].error:
        raise CheckpointFailed(f"the last checkpoint was not written: {ended[-1].error}")


def train_step(worker: Worker, batch: Batch, tokens: int) -> tuple[dict[str, float], torch.Tensor]:
    """One optimizer step on this rank's part of the global batch; returns figures, the same on all ranks.

    The tensor is each MoE layer's load: the pairs of its fullest expert over their mean, 1 for an even layer.
    """
    config = worker.job.config
    weight = prediction_weight(config.schedule, tokens, worker.total_tokens)
    totals = torch.zeros(4, dtype=torch.float64, device=worker.device)
    for ids, targets, documents, last in micro_batches(worker, batch):
        terms = worker.model.training_loss(ids, targets, documents)
        loss = terms.main + weight * terms.prediction + config.balance_factor * terms.balance
        worker.optimizer.backward(loss, last)
        sums = (terms.main, terms.prediction, terms.balance, terms.count)
        totals += torch.stack([value.detach().double() for value in sums])
    if worker.mesh.world > 1:
        dist.all_reduce(totals)
    loss_sum, prediction_sum, balance_sum, counted = totals
    worker.optimizer.reduce(counted.to(torch.float32))
    norm = worker.optimizer.clip(config.clip)
    loss = loss_sum / counted
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise FloatingPointError(
            f"the loss is {loss.item()}, the gradient's norm {norm.item()} after {tokens:,} tokens; lower schedule.peak"
            " or clip"
        )
    rate = learning_rate(config.schedule, tokens, worker.total_tokens)
    worker.optimizer.step(rate)
    if worker.state.ema:
        worker.state.ema.update(worker.mesh.world * batch.ids.size)
    speed = bias_speed(config.schedule, tokens, worker.total_tokens)
    balance = update_router_biases(worker.model, speed, _sum_over_ranks if worker.mesh.world > 1 else None)
    return {
        "train_loss": loss.item(),
        **_further_terms(worker, prediction_sum.item() / counted.item(), balance_sum.item() / batch.ids.size),
        "train_grad_norm": norm.item(),
        "train_learning_rate": rate,
        "train_bias_speed": speed,
        "train_max_violation": balance.max_vio_L.max().item() if len(balance.max_vio_L) else 0.0,
    }, balance.max_vio_L + 1


def _further_terms(worker: Worker, prediction: float, balance: float) -> dict[str, float]:
    """What the model has beside its main loss: per counted token; `balance` is summed over ranks and layers."""
    terms = {}
    if worker.job.model.num_nextn_predict_layers:
        terms["train_prediction_loss"] = prediction
    if worker.job.model.moe_layers:
        terms["train_balance_loss"] = balance / (worker.mesh.world * len(worker.job.model.moe_layers))
    return terms


def micro_batches(
    worker: Worker, batch: Batch
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, bool]]:
    """(ids, targets, documents, whether it is the last), [n, T] each. A target is the next token of the same document,
    else ignored."""
    size = worker.job.config.micro_batch_sequences or len(batch.ids)
    for start in range(0, len(batch.ids), size):
        part = slice(start, start + size)
        ids = torch.from_numpy(batch.ids[part]).to(worker.device)
        documents = torch.from_numpy(batch.documents[part]).to(worker.device)
        mask = torch.from_numpy(batch.mask[part]).to(worker.device)
        targets = torch.full_like(ids, _IGNORED)
        follows = mask[:, 1:] & (documents[:, 1:] == documents[:, :-1])
        targets[:, :-1] = torch.where(follows, ids[:, 1:], _IGNORED)
        yield ids, targets, documents if worker.job.config.document_mask else None, start + size >= len(batch.ids)


def batches(worker: Worker, first: int, last: int) -> Iterator[tuple[int, Batch, float]]:
    """(step, this rank's batch, seconds waited for it), with the next batches always asked for in advance."""
    import ray

    def ask(step: int) -> Any:
        return worker.loaders[step % len(worker.loaders)].batch.remote(step, *worker.slots(step))

    # Past the last step too: any step has a batch.
    coming = deque(ask(step) for step in range(first, first + worker.job.config.prefetch))
    for step in range(first, last):
        began = time.monotonic()
        batch: Batch = ray.get(coming.popleft())
        waited = time.monotonic() - began
        coming.append(ask(step + worker.job.config.prefetch))
        yield step, batch, waited


def _sum_over_ranks(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor)
