"""AdamW on flat master weights, with FP32 moments (torch's own) or block-scaled FP8 moments (`kernels/adamw_fp8.py`).

Both are torch optimizers, so that DeepSpeed's ZeRO can drive them. `prepare` creates their state before the first step,
once the master weights are known, so that a checkpoint can be loaded into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moray.kernels.adamw_fp8 import Fp8Moment, adamw_fp8
from moray.kernels.quantize import BLOCK
from moray.pipelines.pretrain.config import PretrainConfig


@dataclass(frozen=True)
class MasterState:
    """One kind of state of a flat master. tensor: live memory, with one entry per `per` elements of the master."""

    kind: str
    tensor: torch.Tensor
    per: int = 1


class AdamW(Protocol):
    """Interface of AdamW for the sharded optimizers: torch's `step` and `param_groups`, and access to its state."""

    param_groups: list[dict[str, Any]]

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Updates every master that has a gradient, with its group's `lr` and `weight_decay`."""

    def prepare(self) -> None:
        """Creates the state of the groups' masters."""

    def states(self, master: torch.Tensor) -> Iterator[MasterState]:
        """All state of a master."""

    def set_steps(self, steps: int) -> None:
        """Sets the step count of the bias correction, after a checkpoint was loaded."""


class Fp32AdamW(torch.optim.AdamW):
    """torch's fused AdamW; moments have the master's dtype."""

    def prepare(self) -> None:
        for master in _masters(self):
            self.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }

    def states(self, master: torch.Tensor) -> Iterator[MasterState]:
        for kind in ("exp_avg", "exp_avg_sq"):
            yield MasterState(kind, self.state[master][kind])

    def set_steps(self, steps: int) -> None:
        for state in self.state.values():
            state["step"].fill_(steps)


class Fp8AdamW(torch.optim.Optimizer):
    """AdamW with FP8 moments."""

    def prepare(self) -> None:
        for master in _masters(self):
            first, second = (Fp8Moment.zeros(master.numel(), master.device) for _ in range(2))
            self.state[master] = {"step": 0, "first": first, "second": second}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    state = self.state[master]
                    state["step"] += 1
                    beta1, beta2 = group["betas"]
                    adamw_fp8(
                        master.detach(),
                        master.grad,
                        state["first"],
                        state["second"],
                        step=state["step"],
                        rate=group["lr"],
                        beta1=beta1,
                        beta2=beta2,
                        epsilon=group["eps"],
                        weight_decay=group["weight_decay"],
                    )

    def states(self, master: torch.Tensor) -> Iterator[MasterState]:
        for kind, key in (("exp_avg", "first"), ("exp_avg_sq", "second")):
            moment: Fp8Moment = self.state[master][key]
            yield MasterState(f"{kind}_fp8", moment.fp8_N.view(torch.uint8))
            yield MasterState(f"{kind}_scale", moment.scales_J, BLOCK)
            yield MasterState(f"{kind}_power", moment.powers_J, BLOCK)

    def set_steps(self, steps: int) -> None:
        for state in self.state.values():
            state["step"] = steps


def adamw(groups: list[dict[str, Any]], config: PretrainConfig) -> Fp32AdamW | Fp8AdamW:
    """The configured AdamW over torch's parameter groups."""
    settings, rate = config.optimizer, config.schedule.peak
    betas, epsilon = (settings.beta1, settings.beta2), settings.epsilon
    if settings.moments == "fp8":
        return Fp8AdamW(groups, {"lr": rate, "betas": betas, "eps": epsilon, "weight_decay": 0.0})
    return Fp32AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True)


def set_rate(optimizer: AdamW, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _masters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
