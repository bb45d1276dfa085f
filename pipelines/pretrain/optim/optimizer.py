"""The ShardedOptimizer contract, and its reference backend: plain all-reduce, and the whole AdamW state on every rank.

A training step calls `backward` with each micro-batch's summed loss, then `reduce`, `clip`, and `step` or `skip`. The
optimizer normalises by the number of tokens in the global batch, so gradients do not depend on the layout. An expert's
gradient is summed over its EP group by the all-to-all's backward, and over EDP here; dense gradients are summed over
all ranks. Checkpoints are written from `fragments()` alone, in one format for every backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from moray.kernels.util.deferred import DeferredGradients
from moray.models.fp8 import weights_changed
from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.config import PretrainConfig
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.optim.adamw import AdamW, MasterState, adamw, set_rate
from moray.pipelines.pretrain.optim.flat import FlatGroup, flat_groups, square_sum
from moray.pipelines.pretrain.optim.reduction import Reduction
from moray.pipelines.pretrain.validate import check_blocks


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + len(tensor)) of one kind of state of a logical tensor, flat. total: its elements.

    tensor: a view of live memory.
    """

    kind: str
    name: str
    offset: int
    total: int
    tensor: torch.Tensor


class ShardedOptimizer(Protocol):
    """Interface of an optimizer for the training loop and for checkpoints.

    takes_gradients_in_place: operations may add to the weights' `.grad` themselves, without autograd.
    """

    takes_gradients_in_place: bool

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulates a micro-batch's gradients. last: it is the step's last micro-batch."""

    def reduce(self, tokens: torch.Tensor) -> None:
        """Sums gradients over ranks and divides by `tokens`, the global batch's token count (a 0-d tensor)."""

    def clip(self, largest: float) -> torch.Tensor:
        """Scales gradients to a global norm of at most `largest`. Returns the norm before, the same on all ranks.

        If a gradient is not finite, the norm is not, and `step` must not follow.
        """

    def step(self, learning_rate: float) -> None:
        """Updates the weights and clears the gradients."""

    def skip(self) -> None:
        """Clears the gradients, in place of `step`."""

    def fragments(self, owned: bool = False) -> Iterator[Fragment]:
        """This rank's part of the state that a checkpoint must hold. owned: only the part that this rank writes; over
        all ranks, that is every element exactly once."""

    def refresh_weights(self) -> None:
        """Updates the model's weights from the masters, after a checkpoint was loaded into the fragments."""

    def set_steps(self, steps: int) -> None:
        """Sets the step count of Adam's bias correction, after a checkpoint was loaded."""


def sharded_optimizer(
    model: DeepseekV3,
    mesh: Mesh,
    config: PretrainConfig,
    device: torch.device,
    deferred: DeferredGradients | None = None,
) -> ShardedOptimizer:
    """The backend for `zero_stage`, which allocates the weights of a model on the meta device, on `device`. They are
    NaN until the masters in `fragments()` are set and `refresh_weights` is called. deferred: weight gradients that the
    backward defers.

    Raises ValueError for a model that the backend cannot train (`validate.py` checks it earlier).
    """
    if config.optimizer.moments == "fp8":
        check_blocks(model.config)
    if config.parallel.zero_stage and not config.optimizer.offload:
        from moray.pipelines.pretrain.optim.partitioned import PartitionedOptimizer

        return PartitionedOptimizer(model, mesh, config, device, deferred)
    groups = flat_groups(model, mesh)
    if not config.parallel.zero_stage:
        return PlainOptimizer(model, groups, mesh, config, device, deferred)
    from moray.pipelines.pretrain.optim.zero import ZeroOptimizer  # imports deepspeed, which takes seconds

    return ZeroOptimizer(groups, mesh, config, device)


def fragments_of(
    group: FlatGroup, begin: int, end: int, master: torch.Tensor, inner: AdamW, origin: int
) -> Iterator[Fragment]:
    """The fragments of elements [begin, end) of a group. `master` and its state start at element `origin`."""
    for piece in group.pieces(begin, end):
        for state in (MasterState("master", master.detach()), *inner.states(master)):
            first, numel = (begin - origin + piece.at) // state.per, -(-piece.numel // state.per)
            total = -(-piece.total // state.per)
            tensor = state.tensor[first : first + numel]
            yield Fragment(state.kind, piece.name, piece.offset // state.per, total, tensor)


class PlainOptimizer:
    """The reference backend: every rank keeps the whole state of the parameters that it holds. float32 or float64.

    The master weights are the model's weights: each parameter is a view of its group's flat buffer, and so is its
    gradient.
    """

    takes_gradients_in_place = True

    def __init__(
        self,
        model: DeepseekV3,
        groups: list[FlatGroup],
        mesh: Mesh,
        config: PretrainConfig,
        device: torch.device,
        deferred: DeferredGradients | None,
    ) -> None:
        self._mesh = mesh
        self._groups = groups
        self._masters = [_flatten(group, device) for group in groups]
        decays = [config.optimizer.weight_decay if group.decays else 0.0 for group in groups]
        pairs = zip(self._masters, decays, strict=True)
        self._inner = adamw([{"params": [master], "weight_decay": decay} for master, decay in pairs], config)
        self._inner.prepare()
        self._reduction = Reduction(
            model, mesh, list(self._gradients()), deferred, config.parallel.overlap and mesh.world > 1
        )

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self._reduction.begin(last)
        torch.autograd.backward(loss)

    def reduce(self, tokens: torch.Tensor) -> None:
        self._reduction.finish(tokens.device)
        for _, grad in self._gradients():
            grad.div_(tokens)

    def clip(self, largest: float) -> torch.Tensor:
        dense = experts = self._masters[0].new_zeros(())
        for group, grad in self._gradients():
            if group.expert:
                experts = experts + square_sum(grad)
            else:
                dense = dense + square_sum(grad)
        if self._mesh.ep > 1:
            with self._mesh.clock.over(experts.device):
                dist.all_reduce(experts, group=self._mesh.ep_group)
        norm = (dense + experts).sqrt()
        scale = (largest / (norm + 1e-6)).clamp(max=1.0)
        for _, grad in self._gradients():
            grad.mul_(scale)
        return norm

    def step(self, learning_rate: float) -> None:
        set_rate(self._inner, learning_rate)
        self._inner.step()
        self.skip()
        weights_changed()

    def skip(self) -> None:
        for _, grad in self._gradients():
            grad.zero_()

    def fragments(self, owned: bool = False) -> Iterator[Fragment]:
        for group, master in zip(self._groups, self._masters, strict=True):
            replica = self._mesh.rank // self._mesh.ep if group.expert else self._mesh.rank
            begin, end = 0, group.numel
            if owned:
                begin, end = replica * group.partition, (replica + 1) * group.partition
            yield from fragments_of(group, begin, end, master, self._inner, 0)

    def refresh_weights(self) -> None:
        weights_changed()  # the masters are the weights

    def set_steps(self, steps: int) -> None:
        self._inner.set_steps(steps)

    def _gradients(self) -> Iterator[tuple[FlatGroup, torch.Tensor]]:
        for group, master in zip(self._groups, self._masters, strict=True):
            assert master.grad is not None
            yield group, master.grad


def _flatten(group: FlatGroup, device: torch.device) -> torch.nn.Parameter:
    """Allocates the group's weights, NaN, and gradients, zero, as views of flat buffers."""
    flat = _flat_weights(group, device)
    flat.grad = _flat_gradients(flat)
    for parameter, start in zip(group.parameters, group.starts, strict=True):
        place, shape = slice(start, start + parameter.numel()), parameter.shape
        unset = flat.data[place].fill_(float("nan")).view(shape)
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(unset))  # type: ignore[no-untyped-call]
        parameter.grad = flat.grad[place].view(shape)
    return flat


def _flat_weights(group: FlatGroup, device: torch.device) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(group.numel, dtype=group.parameters[0].dtype, device=device))


def _flat_gradients(weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weights, requires_grad=False)
