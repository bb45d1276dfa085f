"""The ShardedOptimizer contract and its reference backend: plain all-reduce, AdamW in full on every rank.

A training step calls, in this order: backward (of summed losses), `reduce`, `clip`, `step`. The loss is normalised
here, by the number of tokens in the global batch, so gradients do not depend on the layout: an expert's gradient is
summed over its EP group by the all-to-all's backward, and over EDP here; dense gradients are summed over all ranks.
Checkpoints are written from `fragments()` alone, one format for every backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.config import PretrainConfig
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.moments import moments_for


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + numel) of a logical tensor's state of one kind, flat; `tensor` is live memory."""

    kind: str
    name: str
    offset: int
    numel: int
    tensor: torch.Tensor


class ShardedOptimizer(Protocol):
    """What the training loop and the checkpoint need of an optimizer."""

    def reduce(self, tokens: torch.Tensor) -> None:
        """Sums gradients over ranks and divides by `tokens`, the global batch's token count (a 0-d tensor)."""

    def clip(self, largest: float) -> torch.Tensor:
        """Scales gradients to a global norm of at most `largest`; returns the norm before, the same on all ranks."""

    def step(self, learning_rate: float) -> None:
        """Updates the weights and clears the gradients."""

    def fragments(self) -> Iterator[Fragment]:
        """Everything a checkpoint must hold to go on, as far as this rank has it."""

    def refresh_weights(self) -> None:
        """Makes the model's weights agree with the masters, after fragments were loaded into."""


class PlainOptimizer:
    """Every rank keeps the whole state of the parameters it holds. float32 or float64; the reference."""

    def __init__(self, model: DeepseekV3, mesh: Mesh, config: PretrainConfig) -> None:
        self._model = model
        self._mesh = mesh
        owners = {id(owner): owner for _, _, owner in model.logical_parameters()}
        expert = {id(owner) for name, _, owner in model.logical_parameters() if ".mlp.experts." in name}
        self._dense = [p for key, p in owners.items() if key not in expert]
        self._experts = [p for key, p in owners.items() if key in expert]
        # Gradients are views of one buffer per group, so that a reduction is one collective.
        self._dense_grads = _bucket(self._dense)
        self._expert_grads = _bucket(self._experts)
        self._moments = moments_for(model, config)

    def reduce(self, tokens: torch.Tensor) -> None:
        if self._mesh.world > 1:
            dist.all_reduce(self._dense_grads)
        if self._mesh.edp > 1:
            dist.all_reduce(self._expert_grads, group=self._mesh.edp_group)
        self._dense_grads.div_(tokens)
        self._expert_grads.div_(tokens)

    def clip(self, largest: float) -> torch.Tensor:
        dense = self._dense_grads.square().sum()
        experts = self._expert_grads.square().sum()
        if self._mesh.ep > 1:
            dist.all_reduce(experts, group=self._mesh.ep_group)
        norm = (dense + experts).sqrt()
        scale = (largest / (norm + 1e-6)).clamp(max=1.0)
        self._dense_grads.mul_(scale)
        self._expert_grads.mul_(scale)
        return norm

    def step(self, learning_rate: float) -> None:
        self._moments.step(learning_rate)
        self._dense_grads.zero_()
        self._expert_grads.zero_()

    def fragments(self) -> Iterator[Fragment]:
        for logical in self._model.logical_parameters():
            for kind, tensor in (("master", logical.view.view(-1)), *self._moments.state(logical)):
                yield Fragment(kind, logical.name, 0, tensor.numel(), tensor)

    def refresh_weights(self) -> None:
        """Nothing to do: this backend's masters are the model's weights."""

    def set_steps(self, steps: int) -> None:
        """Sets the count that Adam's bias correction goes by, after a checkpoint was loaded."""
        self._moments.set_steps(steps)


def _bucket(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """One zeroed buffer of which every parameter's gradient is a view."""
    if not parameters:
        return torch.zeros(0)
    first = parameters[0]
    buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
    at = 0
    for parameter in parameters:
        parameter.grad = buffer[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    return buffer
