"""Gradient all-reduce that overlaps with a step's last backward.

The all-reduce of a layer starts when the backward has passed the layer before it. This delay of one layer leaves time
to compute deferred weight gradients (`kernels/util/deferred.py`). The point in time is the same on all ranks, because
all ranks must issue collectives in the same order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from moray.kernels.util.deferred import DeferredGradients
from moray.models.expert_parallel.layer_progress import LayerObserver, LayerProgress
from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.optim.flat import FlatGroup

_MIN_ELEMENTS = 1 << 18  # smallest all-reduce that is started during the backward
_END = -1  # the embedding: after the backward


class Reduction(LayerObserver):
    """Sums the flat groups' gradients over ranks, in place."""

    def __init__(
        self,
        model: DeepseekV3,
        mesh: Mesh,
        groups: Sequence[tuple[FlatGroup, torch.Tensor]],
        deferred: DeferredGradients | None,
        early: bool,
    ) -> None:
        """early: start all-reduces during the last backward, not only in `finish`. deferred: weight gradients that the
        backward defers."""
        self._clock, self._deferred = mesh.clock, deferred
        self._parts: dict[int, list[tuple[torch.Tensor, dist.ProcessGroup | None]]] = defaultdict(list)
        for group, gradient in groups:
            if group.replicas > 1:
                for number, begin, end in _cuts(model, group) if early else [(_END, 0, group.numel)]:
                    self._parts[number].append((gradient[begin:end], mesh.edp_group if group.expert else None))
        if early:
            model.progress = LayerProgress(self, model.config.num_hidden_layers)
        self._started: list[dist.Work] = []
        self._last = False
        self._complete: tuple[int, int] | None = None  # the last stage that was left, and the deferred gradients then

    def begin(self, last: bool) -> None:
        """Must be called before each backward. last: it is the step's last one."""
        self._last = last

    def finish(self, device: torch.device) -> None:
        """Completes the all-reduce after the last backward."""
        if self._complete is not None:
            self._start(self._complete[0])
        self._start(_END)
        with self._clock.over(device):
            for work in self._started:
                work.wait()
        self._started, self._last, self._complete = [], False, None

    def backward_left(self, stage: int) -> None:
        if not self._last:
            return
        if self._complete is not None:
            before, added = self._complete
            if self._deferred is not None:
                self._deferred.finish(added)
            self._start(before)
        self._complete = (stage, 0 if self._deferred is None else self._deferred.added)

    def _start(self, number: int) -> None:
        for part, group in self._parts[number]:
            work = dist.all_reduce(part, group=group, async_op=True)
            assert work is not None
            self._started.append(work)


def _cuts(model: DeepseekV3, group: FlatGroup) -> Iterator[tuple[int, int, int]]:
    """(stage, begin, end), last stages first: when the backward has left the stage, elements [begin, end) of the flat
    buffer are complete."""
    stages = [model.stage_of(tensor.name) for tensor in group.logical]
    assert stages == sorted(stages), "parameters are in the order of the forward"
    end = group.numel
    for number in sorted({*stages} - {_END}, reverse=True):
        begin = group.logical[stages.index(number)].start
        if end - begin >= _MIN_ELEMENTS:
            yield number, begin, end
            end = begin
    if end:
        yield _END, 0, end
