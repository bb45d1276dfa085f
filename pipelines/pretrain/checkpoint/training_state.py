"""The state of a training rank that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.optim.ema import Ema
from moray.pipelines.pretrain.optim.optimizer import Fragment, ShardedOptimizer
from moray.pipelines.pretrain.resilience.guard import Guard


@dataclass
class TrainingState:
    """Model, optimizer, EMA of the weights if configured, and the guard's recent losses."""

    model: DeepseekV3
    optimizer: ShardedOptimizer
    ema: Ema | None
    guard: Guard

    def fragments(self, owned: bool = False) -> Iterator[Fragment]:
        """The state that is partitioned over ranks. owned: only the part that this rank writes."""
        yield from self.optimizer.fragments(owned)
        if self.ema:
            yield from self.ema.fragments()

    def shared(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(key, tensor) of the state that is equal on all ranks; live memory."""
        for name, bias_E in self.model.logical_biases():
            yield f"buffer/{name}", bias_E
        yield "guard/losses", self.guard.losses

    def loaded(self, steps: int) -> None:
        """Updates derived state after a checkpoint of `steps` steps was loaded into the live memory."""
        self.optimizer.refresh_weights()
        self.optimizer.set_steps(self.guard.taken(steps))
