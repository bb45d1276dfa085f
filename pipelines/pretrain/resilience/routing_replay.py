"""Anticipatory routing (DeepSeek-V4, arXiv 2606.19348, 4.2.3): for a while after trouble, a step's tokens go to the
experts that weights of some steps before would have chosen. An outlier then cannot move the routing that it is itself
routed by. It costs a forward pass a step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moray.actors.data.token_set import Batch
from moray.models.anticipation import choose_experts
from moray.pipelines.pretrain.train_step import Routes, micro_batches
from moray.pipelines.pretrain.worker import Worker


class Anticipation:
    """The routes of the steps to come, chosen by the weights that there were `lag` steps before each."""

    def __init__(self, worker: Worker, batch_of: Callable[[int], Batch]) -> None:
        self._worker = worker
        self._batch_of = batch_of
        self._routes: dict[int, list[list[torch.Tensor]]] = {}

    def routes(self, step: int) -> Routes | None:
        """The routes of a step that is about to be measured; None if it routes by itself. All ranks must ask."""
        guard, job = self._worker.state.guard, self._worker.job
        if not guard.anticipates(step):
            self._routes.clear()
            return None
        for coming in range(step, min(step + guard.config.anticipate_lag + 1, job.config.steps)):
            if coming not in self._routes and guard.anticipates(coming) and not guard.skips(coming):
                self._routes[coming] = [
                    choose_experts(self._worker.model, part.ids, part.targets, part.documents, part.rows)
                    for part in micro_batches(self._worker, self._batch_of(coming))
                ]
        return self._routes.pop(step)

    def forget(self) -> None:
        """What was chosen by weights that are no more."""
        self._routes.clear()
