"""Anticipatory routing (DeepSeek-V4, arXiv 2606.19348, 4.2.3), used for a number of steps after loss spikes.

A step's tokens are routed to the experts that the weights of a few steps earlier choose. So an outlier cannot influence
the routing that is applied to it. It costs one forward pass per step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moray.actors.data.token_set import Batch
from moray.models.anticipation import choose_experts
from moray.pipelines.pretrain.train_step import MicroBatch, Routes, micro_batches
from moray.pipelines.pretrain.worker import Worker


class Anticipation:
    """Routes of the next steps, each chosen by the weights of `anticipate_lag` steps earlier."""

    def __init__(self, worker: Worker, batch_of: Callable[[int], Batch]) -> None:
        self._worker = worker
        self._batch_of = batch_of
        self._routes: dict[int, list[list[torch.Tensor]]] = {}  # int16: those of several steps are kept

    def routes(self, step: int) -> Routes | None:
        """The routes of the next step to be measured; None if it uses its own routing. All ranks must call this."""
        guard, job = self._worker.state.guard, self._worker.job
        if not guard.anticipates(step):
            self._routes.clear()
            return None
        for upcoming in range(step, min(step + guard.config.anticipate_lag + 1, job.config.steps)):
            if upcoming not in self._routes and guard.anticipates(upcoming) and not guard.skips(upcoming):
                self._routes[upcoming] = [
                    [ids_RK.to(torch.int16) for ids_RK in self._chosen(part)]
                    for part in micro_batches(self._worker, self._batch_of(upcoming), upcoming)
                ]
        return [[ids_RK.long() for ids_RK in routes] for routes in self._routes.pop(step)]

    def _chosen(self, part: MicroBatch) -> list[torch.Tensor]:
        return choose_experts(self._worker.model, part.ids, part.targets, part.documents, part.rows)

    def clear(self) -> None:
        """Discards all routes, because a rollback replaced the weights that chose them."""
        self._routes.clear()
