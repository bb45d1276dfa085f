"""Everything of a training rank that a checkpoint holds."""

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
    """Model, optimizer, the average of the weights where one is kept, and what losses are judged by."""

    model: DeepseekV3
    optimizer: ShardedOptimizer
    ema: Ema | None
    guard: Guard

    def fragments(self, owned: bool = False) -> Iterator[Fragment]:
        """What is spread over ranks; `owned`: as far as this rank is to write it."""
        yield from self.optimizer.fragments(owned)
        if self.ema:
            yield from self.ema.fragments()

    def shared(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is the same on all ranks, by key; live memory."""
        for name, bias_E in self.model.logical_biases():
            yield f"buffer/{name}", bias_E
        yield "guard/losses", self.guard.losses

    def loaded(self, steps: int) -> None:
        """Makes everything agree after a checkpoint of `steps` steps was loaded into the live memory."""
        self.optimizer.refresh_weights()
        self.optimizer.set_steps(self.guard.taken(steps))
