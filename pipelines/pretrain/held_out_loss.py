"""The loss on held-out sequences while training: of the current weights, without any effect on training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moray.actors.data.held_out import HeldOutPlan
from moray.actors.data.token_set import Batch
from moray.models.expert_parallel.interleave import run_alone
from moray.pipelines.pretrain.train_step import add_by_source, micro_batch, sum_over_ranks
from moray.pipelines.pretrain.worker import Worker


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss over tokens, nats: of each source, and of all. Sources without any target are left out."""

    sources: dict[str, float]
    total: float


@torch.no_grad()
def held_out_loss(worker: Worker, plan: HeldOutPlan, read: Callable[[int, int], Batch]) -> HeldOutLoss:
    """Measures the loss of the current weights. All ranks must call this; each computes a share.

    read: the sequences of slots [start, stop) of the plan. The model stays in training mode, in which a forward without
    gradients counts nothing for the routers.
    """
    world, rank, slots = worker.mesh.world, worker.mesh.rank, plan.slots
    most = worker.job.config.parallel.micro_batch_sequences or -(-max(worker.plan.sizes) // world)
    size = min(most, -(-slots // world))
    found_S2 = torch.zeros(len(plan.sources), 2, dtype=torch.float64, device=worker.device)
    if worker.model.progress is not None:
        worker.model.progress.micro_batches = 1
    for first in range(0, slots, size * world):
        start = min(first + rank * size, slots)
        batch = read(start, min(start + size, slots))
        part = micro_batch(worker, batch, slice(None), last=True)
        parts = worker.model.training_parts(part.ids, part.targets, part.documents, token_positions_R=part.rows)
        add_by_source(found_S2, run_alone(parts).sequences, batch)
    sum_over_ranks(worker, found_S2)
    found = found_S2.tolist()
    sources = {name: loss / count for name, (loss, count) in zip(plan.sources, found, strict=True) if count}
    loss, count = (sum(column) for column in zip(*found, strict=True))
    return HeldOutLoss(sources, loss / max(count, 1.0))
