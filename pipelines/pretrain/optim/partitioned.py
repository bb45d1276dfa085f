"""Masters, moments, gradients and weights in partitions: stages 1 to 3 of ZeRO (arXiv 1910.02054).

Masters are partitioned over all ranks that hold a weight. The weights that layers multiply by have the training's own
dtype. Stage 1 keeps them and their gradients complete on every rank. Stage 2 reduces gradients to shards after each
backward. Stage 3 shards the weights too: a stage's weights are gathered while the stage before it computes, and freed
when all micro-batches have run it; the backward gathers them again.

Layers run as generators, several micro-batches in turns, so hooks of modules do not fire. `LayerProgress` says when a
stage is entered and left. These points are the same on all ranks, and so is the order of collectives.

Notable: a stage's gradients are reduced when the backward has left the stage before it. This delay of one stage leaves
time to compute deferred weight gradients (`kernels/util/deferred.py`). The weights of two stages are in memory at a
time, the one in use and the next, or three with micro-batches that take turns; and so are the gradients of the stage in
use and of those in reduction.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from moray.kernels.util.deferred import DeferredGradients
from moray.models.expert_parallel.layer_progress import LayerObserver, LayerProgress
from moray.models.fp8 import weights_changed
from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.config import PretrainConfig
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.optim.adamw import adamw, set_rate
from moray.pipelines.pretrain.optim.flat import FlatGroup, square_sum, stage_groups
from moray.pipelines.pretrain.optim.optimizer import Fragment, fragments_of
from moray.pipelines.pretrain.optim.unit import Cache, RankSet, RankSplit, Unit

_EMBEDDING = -1
_DTYPES = {"float64": torch.float64, "float32": torch.float32}  # of weights; BF16 in the other precisions


class PartitionedOptimizer(LayerObserver):
    """Implements `ShardedOptimizer`. units: of all stages, and of several."""

    takes_gradients_in_place = True

    def __init__(
        self,
        model: DeepseekV3,
        mesh: Mesh,
        config: PretrainConfig,
        device: torch.device,
        deferred: DeferredGradients | None,
    ) -> None:
        self._mesh, self._deferred, self._device = mesh, deferred, device
        self._end = model.config.num_hidden_layers
        caches = list(model.quantizations())
        self.units = [_unit(group, mesh, config, device, caches) for group in stage_groups(model, mesh)]
        self._stages: dict[int, list[Unit]] = {stage: [] for stage in range(_EMBEDDING, self._end + 1)}
        for unit in self.units:
            if unit.group.stage is not None:
                self._stages[unit.group.stage].append(unit)
        if model.config.num_nextn_predict_layers:
            self._stages[self._end] += self._stages[_EMBEDDING]
        decays = [config.optimizer.weight_decay if unit.group.decays else 0.0 for unit in self.units]
        pairs = zip(self.units, decays, strict=True)
        self._inner = adamw([{"params": [unit.master], "weight_decay": decay} for unit, decay in pairs], config)
        self._inner.prepare()
        self._last = False
        self._left: tuple[int, int] | None = None  # the stage that the backward left, and the deferred gradients then
        self._entered = self._end  # the stage that the backward entered last
        self._reducing: list[Unit] = []
        model.progress = self._progress = LayerProgress(self, self._end)

    # ShardedOptimizer

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self._last = last
        self._progress.begin_backward()
        torch.autograd.backward(loss)
        self._progress.end_backward()
        self._reduce_left()
        self._finish_reductions()

    def reduce(self, tokens: torch.Tensor) -> None:
        with self._mesh.clock.over(tokens.device):
            for unit in self.units:
                if unit.group.stage is None:
                    unit.reduce(last=True)
                    unit.finish_reduction()
                unit.complete_gradient()
        for gradient in self._gradients():
            gradient.div_(tokens)

    def clip(self, largest: float) -> torch.Tensor:
        gradients = self._gradients()
        square = torch.stack([square_sum(gradient) for gradient in gradients]).sum()
        if self._mesh.world > 1:
            with self._mesh.clock.over(square.device):
                dist.all_reduce(square)
        norm = square.sqrt()
        scale = (largest / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
        return norm

    def step(self, learning_rate: float) -> None:
        set_rate(self._inner, learning_rate)
        self._inner.step()
        self.skip()
        self.refresh_weights()

    def skip(self) -> None:
        for unit in self.units:
            unit.clear_gradient()

    def fragments(self, owned: bool = False) -> Iterator[Fragment]:  # a rank holds only the part that it owns
        for unit in self.units:
            group, begin = unit.group, unit.begin
            yield from fragments_of(group, begin, begin + group.partition, unit.master, self._inner, begin)

    def refresh_weights(self) -> None:
        with self._mesh.clock.over(self._device):
            for unit in self.units:
                unit.refresh()
        weights_changed()

    def set_steps(self, steps: int) -> None:
        self._inner.set_steps(steps)

    # LayerObserver

    def forward_enters(self, stage: int) -> None:
        self._wait(stage)
        self._gather(stage + 1)
        if torch.is_grad_enabled() and stage == self._end:  # the head's gradient is computed in the forward
            self._open(stage)

    def forward_left(self, stage: int) -> None:
        if stage < self._end or not torch.is_grad_enabled():
            self._release(stage)

    def backward_enters(self, stage: int) -> None:
        self._entered = stage
        if stage != _EMBEDDING:  # whose backward uses no weights
            self._wait(stage)
        if stage > 0:
            self._gather(stage - 1)
        self._open(stage)

    def backward_left(self, stage: int) -> None:
        self._release(stage)
        self._reduce_left()
        self._left = (stage, 0 if self._deferred is None else self._deferred.added)

    def _gather(self, stage: int) -> None:
        for unit in self._stages.get(stage, []):
            unit.gather()

    def _wait(self, stage: int) -> None:
        self._gather(stage)
        with self._mesh.clock.over(self._device):
            for unit in self._stages[stage]:
                unit.wait()

    def _release(self, stage: int) -> None:
        for unit in self._stages[stage]:
            unit.release()

    def _open(self, stage: int) -> None:
        for unit in self._stages[stage]:
            unit.open_gradient()

    def _reduce_left(self) -> None:
        """Starts to reduce the stage that the backward left last."""
        if self._left is None:
            return
        (stage, added), self._left = self._left, None
        if self._deferred is not None:
            self._deferred.finish(added)
        self._finish_reductions()
        for unit in self._stages[stage]:
            own = unit.group.stage == stage
            if own or self._entered > _EMBEDDING:  # else the embedding's own stage adds to its gradient already
                unit.reduce(self._last and own)
                self._reducing.append(unit)

    def _finish_reductions(self) -> None:
        with self._mesh.clock.over(self._device):
            for unit in self._reducing:
                unit.finish_reduction()
        self._reducing.clear()

    def _gradients(self) -> list[torch.Tensor]:
        gradients = [unit.master.grad for unit in self.units]
        return [gradient for gradient in gradients if gradient is not None]


def _unit(group: FlatGroup, mesh: Mesh, config: PretrainConfig, device: torch.device, caches: list[Cache]) -> Unit:
    parallel = config.parallel
    zero = 1 if group.stage is None else parallel.zero_stage
    if group.expert and parallel.expert_zero_stage is not None:
        zero = parallel.expert_zero_stage
    weights, gradients = _splits(group, mesh, zero)
    mine = {id(parameter) for parameter in group.parameters}
    return Unit(
        group,
        _DTYPES.get(config.precision, torch.bfloat16) if group.stage is not None else _wide(config),
        device,
        weights,
        gradients,
        [cache for cache in caches if id(cache[1][0]) in mine],
        narrow=parallel.reduce_dtype == "bf16" and config.precision in ("bf16", "fp8") and group.stage is not None,
    )


def _wide(config: PretrainConfig) -> torch.dtype:
    """The dtype of norms and routers."""
    return torch.float64 if config.precision == "float64" else torch.float32


def _splits(group: FlatGroup, mesh: Mesh, zero: int) -> tuple[RankSplit, RankSplit]:
    """How a group's weights and its gradients are split."""
    if group.expert:
        ranks = RankSet(mesh.edp, mesh.rank // mesh.ep, mesh.edp_group if mesh.edp > 1 else None)
    else:
        ranks = RankSet(mesh.world, mesh.rank, dist.group.WORLD if mesh.world > 1 else None)
    whole, sharded = RankSplit(RankSet.alone(), ranks), RankSplit(ranks, RankSet.alone())
    if zero == 3 and not group.expert and mesh.dense_groups is not None:
        shards, copies = mesh.dense_groups
        width = mesh.dense
        sharded = RankSplit(
            RankSet(width, mesh.rank % width, shards), RankSet(mesh.world // width, mesh.rank // width, copies)
        )
    return sharded if zero == 3 else whole, whole if zero == 1 else sharded
