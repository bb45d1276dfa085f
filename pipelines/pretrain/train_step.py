"""One training step of one rank, in two halves: `measure` leaves weights as they are, `take` changes them.

Between the two, the loss and the gradient's norm are known, on all ranks the same: a batch that would harm is dropped.
Losses are summed, not averaged, until the optimizer divides by the global number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from moray.actors.data.token_set import Batch
from moray.models.balance import update_router_biases
from moray.models.expert_parallel.interleave import interleave
from moray.models.loss import TrainingLoss
from moray.pipelines.pretrain.lr_schedule import bias_speed, learning_rate, prediction_weight
from moray.pipelines.pretrain.worker import Worker

_IGNORED = -100

Routes = Sequence[Sequence[torch.Tensor]]  # of each micro-batch, of each router: the experts to go to


@dataclass(frozen=True)
class Measured:
    """Of the global batch: loss and multi-token prediction's, nats per token; balance per layer; the gradient's norm
    before clipping. `flags`: how many ranks raised theirs. `count`: targets; without any, nothing is there to learn,
    and all figures are 0."""

    loss: float
    prediction: float
    balance: float
    norm: float
    flags: int
    count: int

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


@dataclass(frozen=True)
class MicroBatch:
    """[n, T] each. A target is the next token of the same document, else it is not counted. rows: int64, the places
    with a token, where some are padding. `last` of its batch."""

    ids: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None
    last: bool
    rows: torch.Tensor | None = None


def train_step(worker: Worker, batch: Batch, tokens: int) -> tuple[dict[str, float], torch.Tensor]:
    """Both halves, for a batch that comes after `tokens` tokens: figures, and each MoE layer's load (see `take`).

    Raises FloatingPointError, with the weights as they were, for a loss or gradient that is not finite.
    """
    measured = measure(worker, batch, tokens)
    if not measured.is_finite:
        raise FloatingPointError(f"the loss is {measured.loss}, the gradient's norm {measured.norm}")
    return take(worker, batch, tokens, measured)


def measure(worker: Worker, batch: Batch, tokens: int, routes: Routes | None = None, flag: bool = False) -> Measured:
    """Loss and gradient of this rank's part of the global batch, summed over ranks; the gradient is clipped.

    With `routes`, tokens go to these experts. `flag` is for whatever all ranks must hear of at the same step.
    """
    config = worker.job.config
    weight = prediction_weight(config.schedule, tokens, worker.total_tokens)
    totals = torch.zeros(5, dtype=torch.float64, device=worker.device)
    totals[4] = flag
    for terms, last in _losses(worker, batch, routes):
        loss = terms.main + weight * terms.mtp + config.balance_factor * terms.balance
        worker.optimizer.backward(loss, last)
        if worker.later is not None:
            worker.later.finish()
        sums = (terms.main, terms.mtp, terms.balance, terms.count)
        totals[:4] += torch.stack([value.detach().double() for value in sums])
    _sum_over_ranks(worker, totals)
    main, prediction, balance, count, flags = totals.tolist()
    worker.optimizer.reduce(totals[3].clamp(min=1).to(torch.float32))
    norm = worker.optimizer.clip(config.clip).item()
    layers = max(1, len(worker.job.model.moe_layers))
    tokens = max(1.0, count)
    return Measured(main / tokens, prediction / tokens, balance / (tokens * layers), norm, int(flags), int(count))


def take(worker: Worker, batch: Batch, tokens: int, measured: Measured) -> tuple[dict[str, float], torch.Tensor]:
    """Updates weights, average and router biases; figures by metric name. A batch without a target changes no weight.

    The tensor is each MoE layer's load: the pairs of its fullest expert over their mean, 1 for an even layer.
    """
    config = worker.job.config
    rate = learning_rate(config.schedule, tokens, worker.total_tokens)
    if measured.count:
        worker.optimizer.step(rate)
        if worker.state.ema:
            worker.state.ema.update(worker.mesh.world * batch.ids.size)
    else:
        drop(worker)
    speed = bias_speed(config.schedule, tokens, worker.total_tokens)
    balance = update_router_biases(worker.model, speed, partial(_sum_over_ranks, worker))
    figures = {"train_loss": measured.loss}
    if worker.job.model.num_nextn_predict_layers:
        figures["train_prediction_loss"] = measured.prediction
    if worker.job.model.moe_layers:
        figures["train_balance_loss"] = measured.balance
    figures |= {
        "train_grad_norm": measured.norm,
        "train_learning_rate": rate,
        "train_bias_speed": speed,
        "train_max_violation": balance.max_vio_L.max().item() if len(balance.max_vio_L) else 0.0,
    }
    return figures, balance.max_vio_L + 1


def drop(worker: Worker) -> None:
    """Forgets what was measured: no weight, average, bias or count is changed."""
    worker.optimizer.skip()
    worker.model.reset_counters()


def _losses(worker: Worker, batch: Batch, routes: Routes | None) -> Iterator[tuple[TrainingLoss, bool]]:
    """The loss of each micro-batch, or of every two, each computed in the other's waits; and whether it is the last."""
    model, together = worker.model, 2 if worker.overlaps else 1
    batches = list(micro_batches(worker, batch))
    for first in range(0, len(batches), together):
        turn = range(first, min(first + together, len(batches)))
        works = [
            model.training_parts(one.ids, one.targets, one.documents, token_positions_R=one.rows, routes=given)
            for one, given in ((batches[n], routes[n] if routes else None) for n in turn)
        ]
        losses = interleave(works)
        yield sum(losses[1:], losses[0]), batches[turn[-1]].last


def micro_batches(worker: Worker, batch: Batch) -> Iterator[MicroBatch]:
    """The parts of this rank's batch, on its device."""
    size = worker.job.config.micro_batch_sequences or len(batch.ids)
    for start in range(0, len(batch.ids), size):
        part = slice(start, start + size)
        ids = torch.from_numpy(batch.ids[part]).to(worker.device)
        documents = torch.from_numpy(batch.documents[part]).to(worker.device)
        mask = torch.from_numpy(batch.mask[part]).to(worker.device)
        targets = torch.full_like(ids, _IGNORED)
        follows = mask[:, 1:] & (documents[:, 1:] == documents[:, :-1])
        targets[:, :-1] = torch.where(follows, ids[:, 1:], _IGNORED)
        shown = documents if worker.job.config.document_mask else None
        yield MicroBatch(ids, targets, shown, start + size >= len(batch.ids), _rows(batch.mask[part], worker.device))


def _rows(mask: npt.NDArray[np.bool_], device: torch.device) -> torch.Tensor | None:
    """The places that hold a token; found on the host, where the batch comes from."""
    return None if mask.all() else torch.from_numpy(np.flatnonzero(mask)).to(device)


def _sum_over_ranks(worker: Worker, tensor: torch.Tensor) -> None:
    if worker.mesh.world > 1:
        with worker.mesh.clock.over(tensor.device):
            dist.all_reduce(tensor)
