"""One training step of one rank, in two halves: `measure` computes loss and gradient, `take` updates the weights.

After `measure`, all ranks know the same loss and gradient norm, so that all of them can drop a harmful batch. Losses
are summed, not averaged; the optimizer divides by the global number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from moray.actors.data.token_set import Batch
from moray.kernels.util.device import runtime
from moray.models.balance import update_router_biases
from moray.models.expert_parallel.exchange_check import CorruptExchange
from moray.models.expert_parallel.interleave import interleave
from moray.models.loss import LossWeights, TrainingLoss
from moray.pipelines.pretrain.lr_schedule import bias_speed, learning_rate, prediction_weight
from moray.pipelines.pretrain.worker import Worker

_IGNORED = -100
_NAMED = 8  # exchanges in an error

Routes = Sequence[Sequence[torch.Tensor]]  # by micro-batch and router: the chosen experts


@dataclass(frozen=True)
class Measured:
    """Results of `measure` for the global batch.

    loss, prediction: main and MTP loss, nats per token. balance: balance loss per layer. norm: gradient norm before
    clipping. flags: number of ranks that set their flag. count: number of targets; if 0, all other values are 0.
    sources: the sum of main losses and the number of targets of each source of `job.sources`, one after another.
    busy_R: seconds of each rank, if they were given.
    """

    loss: float
    prediction: float
    balance: float
    norm: float
    flags: int
    count: int
    sources: tuple[float, ...] = ()
    busy_R: tuple[float, ...] = ()

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


@dataclass(frozen=True)
class MicroBatch:
    """Part of a rank's batch; tensors [n, T]. Targets are the next tokens; -100, which has no loss, if the next token
    belongs to another document or is padding. n is 0 where other ranks have a sequence more.

    last: whether it is the batch's last. rows: int64, flat positions of tokens; None if there is no padding.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None
    last: bool
    rows: torch.Tensor | None = None


def train_step(worker: Worker, batch: Batch, step: int) -> tuple[dict[str, float], torch.Tensor]:
    """Runs both halves for this rank's part of a step's batch. Returns metrics and each MoE layer's load (see `take`).

    Raises FloatingPointError, with unchanged weights, for a loss or gradient that is not finite.
    """
    measured = measure(worker, batch, step)
    if not measured.is_finite:
        raise FloatingPointError(f"the loss is {measured.loss}, the gradient norm {measured.norm}")
    return take(worker, step, measured)


def measure(
    worker: Worker,
    batch: Batch,
    step: int,
    routes: Routes | None = None,
    flag: bool = False,
    busy: float | None = None,
) -> Measured:
    """Loss and gradient of this rank's part of the global batch, summed over ranks; the gradient is clipped.

    `routes` overrides the routers' choice of experts. `flag` signals a condition of this rank to all ranks at the same
    step. `busy`, given on all ranks or on none, is a number of seconds that all ranks receive. Raises CorruptExchange
    on all ranks if one received other tokens than were sent to it.
    """
    config = worker.job.config
    mtp = prediction_weight(config.schedule, worker.tokens_before(step), worker.total_tokens)
    weights = LossWeights(mtp, config.balance_factor)
    by_source, ranks = 2 * len(worker.job.sources), 0 if busy is None else worker.mesh.world
    totals = torch.zeros(6 + by_source + ranks, dtype=torch.float64, device=worker.device)
    totals[4] = flag
    if busy is not None:
        totals[6 + by_source + worker.mesh.rank] = busy
    sequences: list[torch.Tensor] = []
    for terms, last in _losses(worker, batch, step, routes, weights):
        worker.optimizer.backward(weights.of(terms), last)
        if worker.deferred is not None:
            worker.deferred.finish()
        sums = (terms.main, terms.mtp, terms.balance, terms.count)
        totals[:4] += torch.stack([value.detach().double() for value in sums])
        sequences.append(terms.sequences)
    if worker.check is not None:
        totals[5] = worker.check.total()
    add_by_source(totals[6 : 6 + by_source].view(-1, 2), torch.cat(sequences), batch)
    sum_over_ranks(worker, totals)
    main, prediction, balance, count, flags, corrupt, *rest = totals.tolist()
    if corrupt:
        raise CorruptExchange(_corrupt(worker, step))
    worker.optimizer.reduce(totals[3].clamp(min=1).to(torch.float32))
    norm = worker.optimizer.clip(config.optimizer.clip).item()
    layers = max(1, len(worker.job.model.moe_layers))
    tokens = max(1.0, count)
    means = (main / tokens, prediction / tokens, balance / (tokens * layers))
    return Measured(*means, norm, int(flags), int(count), tuple(rest[:by_source]), tuple(rest[by_source:]))


def add_by_source(found_S2: torch.Tensor, sequences_B2: torch.Tensor, batch: Batch) -> None:
    """Adds a batch's sequences, the sum of losses and the number of targets of each, to those of their sources."""
    if len(found_S2) and batch.sources is not None:
        found_S2.index_add_(0, on_device(batch.sources.astype(np.int64), found_S2.device), sequences_B2)


def _corrupt(worker: Worker, step: int) -> str:
    """Which ranks received other rows than were sent, and in which layers. All ranks must call this."""
    assert worker.check is not None
    everyone: list[Any] = [None] * worker.mesh.world
    dist.all_gather_object(everyone, list(worker.check.found())[:_NAMED])  # a save may be using the group for it
    found = [(layer, sender, rank) for rank, pairs in enumerate(everyone) for layer, sender in pairs]
    texts = [f"rank {rank} from rank {sender} in layer {layer}" for layer, sender, rank in sorted(found)[:_NAMED]]
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"step {step}: tokens arrived with other expert ids than were sent: {'; '.join(texts)}{more}"


def take(worker: Worker, step: int, measured: Measured) -> tuple[dict[str, float], torch.Tensor]:
    """Updates weights, EMA and router biases. A batch without targets changes no weight.

    Returns metrics by name, and each MoE layer's load [L]: tokens of its fullest expert over the mean, 1 if even.
    """
    config, tokens = worker.job.config, worker.tokens_before(step)
    rate = learning_rate(config.schedule, tokens, worker.total_tokens)
    if measured.count:
        worker.optimizer.step(rate)
        if worker.state.ema:
            worker.state.ema.update(worker.tokens_before(step + 1) - tokens)
    else:
        drop(worker)
    speed = bias_speed(config.schedule, tokens, worker.total_tokens)
    balance = update_router_biases(worker.model, speed, partial(sum_over_ranks, worker))
    metrics = {"train_loss": measured.loss}
    if worker.job.model.num_nextn_predict_layers:
        metrics["train_prediction_loss"] = measured.prediction
    if worker.job.model.moe_layers:
        metrics["train_balance_loss"] = measured.balance
    metrics |= {
        "train_grad_norm": measured.norm,
        "train_learning_rate": rate,
        "train_bias_speed": speed,
        "train_max_violation": balance.max_vio_L.max().item() if len(balance.max_vio_L) else 0.0,
    }
    return metrics, balance.max_vio_L + 1


def drop(worker: Worker) -> None:
    """Discards the measured gradients and expert counts; weights, EMA and router biases stay unchanged."""
    worker.optimizer.skip()
    worker.model.reset_counters()


def _losses(
    worker: Worker, batch: Batch, step: int, routes: Routes | None, weights: LossWeights
) -> Iterator[tuple[TrainingLoss, bool]]:
    """(loss, whether it is the batch's last) of each micro-batch; of each pair of micro-batches if they overlap."""
    model, together = worker.model, 2 if worker.overlaps else 1
    in_place = weights if worker.optimizer.takes_gradients_in_place else None
    batches = list(micro_batches(worker, batch, step))
    for first in range(0, len(batches), together):
        group = range(first, min(first + together, len(batches)))
        works = [
            model.training_parts(
                one.ids, one.targets, one.documents, token_positions_R=one.rows, routes=given, weights=in_place
            )
            for one, given in ((batches[n], routes[n] if routes else None) for n in group)
        ]
        if model.progress is not None:
            model.progress.micro_batches = len(works)
        losses = interleave(works)
        yield sum(losses[1:], losses[0]), batches[group[-1]].last


def micro_batches(worker: Worker, batch: Batch, step: int) -> Iterator[MicroBatch]:
    """The parts of this rank's batch, on its device; as many as on any other rank, because every one is a collective
    computation."""
    most = -(-worker.plan.size(step) // worker.mesh.world)
    size = worker.job.config.parallel.micro_batch_sequences or most
    for start in range(0, most, size):
        yield micro_batch(worker, batch, slice(start, start + size), last=start + size >= most)


def micro_batch(worker: Worker, batch: Batch, part: slice, last: bool) -> MicroBatch:
    """Some sequences of a batch, on the rank's device."""
    ids, documents, mask = (on_device(array[part], worker.device) for array in (batch.ids, batch.documents, batch.mask))
    targets = torch.full_like(ids, _IGNORED)
    follows = mask[:, 1:] & (documents[:, 1:] == documents[:, :-1])
    targets[:, :-1] = torch.where(follows, ids[:, 1:], _IGNORED)
    shown = documents if worker.job.config.document_mask else None
    return MicroBatch(ids, targets, shown, last, _rows(batch.mask[part], worker.device))


def _rows(mask: npt.NDArray[np.bool_], device: torch.device) -> torch.Tensor | None:
    """Flat positions of tokens, computed on the host, which holds the batch; None if there is no padding."""
    return None if mask.all() else on_device(np.flatnonzero(mask), device)


def on_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for."""
    source = torch.from_numpy(array)
    held = runtime(device).host_tensor(source.shape, source.dtype).copy_(source)
    return held.to(device, non_blocking=True)


def sum_over_ranks(worker: Worker, tensor: torch.Tensor) -> None:
    """Sums a tensor over all ranks, in place."""
    if worker.mesh.world > 1:
        with worker.mesh.clock.over(tensor.device):
            dist.all_reduce(tensor)
