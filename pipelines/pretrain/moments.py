"""AdamW's step and its moments: FP32 in torch's own optimizer, or FP8 by block (`kernels/adamw_fp8.py`).

A moment's blocks are 128 consecutive elements of the *logical* tensor, so that a checkpoint does not depend on how a
run lays its experts out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from moray.kernels.adamw_fp8 import Fp8Moment, adamw_fp8
from moray.models.fp8 import weights_changed
from moray.models.model import DeepseekV3, LogicalParameter
from moray.pipelines.pretrain.config import PretrainConfig


class Moments(Protocol):
    """Steps the masters, which are the model's parameters, and holds what that needs."""

    def step(self, learning_rate: float) -> None:
        """One step with the gradients that the parameters have."""

    def state(self, logical: LogicalParameter) -> Iterator[tuple[str, torch.Tensor]]:
        """(kind, live flat tensor) of everything held for a logical parameter."""

    def set_steps(self, steps: int) -> None:
        """Sets the count that the bias correction goes by, after a checkpoint was loaded."""


def moments_for(model: DeepseekV3, config: PretrainConfig) -> Moments:
    return Fp8Moments(model, config) if config.moments == "fp8" else Fp32Moments(model, config)


class Fp32Moments:
    """torch's fused AdamW."""

    def __init__(self, model: DeepseekV3, config: PretrainConfig) -> None:
        owners = {id(owner): owner for _, _, owner in model.logical_parameters()}
        matrices = [p for p in owners.values() if p.dim() >= 2]
        vectors = [p for p in owners.values() if p.dim() < 2]
        self._adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.schedule.peak,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        for parameter in owners.values():
            self._adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, learning_rate: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()

    def state(self, logical: LogicalParameter) -> Iterator[tuple[str, torch.Tensor]]:
        begin = logical.view.storage_offset() - logical.owner.storage_offset()
        for kind in ("exp_avg", "exp_avg_sq"):
            whole: torch.Tensor = self._adam.state[logical.owner][kind]
            yield kind, whole.view(-1)[begin : begin + logical.view.numel()]

    def set_steps(self, steps: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(steps)


class Fp8Moments:
    """The reference: one logical tensor after the other."""

    def __init__(self, model: DeepseekV3, config: PretrainConfig) -> None:
        self._model = model
        self._config = config
        self._steps = 0
        self._moments = {
            name: (Fp8Moment.zeros(view.numel(), view.device), Fp8Moment.zeros(view.numel(), view.device))
            for name, view, _ in model.logical_parameters()
        }

    def step(self, learning_rate: float) -> None:
        self._steps += 1
        for name, view, owner in self._model.logical_parameters():
            assert owner.grad is not None
            begin = view.storage_offset() - owner.storage_offset()
            grad = owner.grad.view(-1)[begin : begin + view.numel()]
            adamw_fp8(
                view.view(-1),
                grad,
                *self._moments[name],
                step=self._steps,
                rate=learning_rate,
                beta1=self._config.beta1,
                beta2=self._config.beta2,
                epsilon=self._config.epsilon,
                weight_decay=self._config.weight_decay if owner.dim() >= 2 else 0.0,
            )
        weights_changed()

    def state(self, logical: LogicalParameter) -> Iterator[tuple[str, torch.Tensor]]:
        for kind, moment in zip(("exp_avg", "exp_avg_sq"), self._moments[logical.name], strict=True):
            yield f"{kind}_fp8", moment.fp8_N.view(torch.uint8)
            yield f"{kind}_scale", moment.scales_J
            yield f"{kind}_power", moment.powers_J

    def set_steps(self, steps: int) -> None:
        self._steps = steps
