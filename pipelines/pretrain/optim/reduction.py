"""Gradients summed over ranks, begun while the last backward of a step still computes those of earlier layers.

The sums of a layer are begun when the backward has passed the layer before it, and not at once: so there is a layer's
time for the gradients that were put off (`kernels/util/deferred.py`). That point is the same on all ranks, as the order
of collectives must be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from moray.kernels.util.deferred import DeferredGradients
from moray.models.expert_parallel.backward_progress import Milestones
from moray.models.model import DeepseekV3
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.optim.flat import FlatGroup

_LEAST = 1 << 18  # numbers that are worth a collective of their own
_END = -1  # after the backward


class Reduction:
    """Of the flat groups' gradients, in place."""

    def __init__(
        self,
        model: DeepseekV3,
        mesh: Mesh,
        groups: Sequence[tuple[FlatGroup, torch.Tensor]],
        later: DeferredGradients | None,
        early: bool,
    ) -> None:
        """Nothing is begun before `finish` unless `early`. `later`: the gradients that a backward puts off."""
        self._clock, self._later = mesh.clock, later
        self._parts: dict[int, list[tuple[torch.Tensor, dist.ProcessGroup | None]]] = defaultdict(list)
        for group, gradient in groups:
            if group.replicas > 1:
                for number, begin, end in _cuts(model, group) if early else [(_END, 0, group.numel)]:
                    self._parts[number].append((gradient[begin:end], mesh.edp_group if group.expert else None))
        if early:
            model.milestones = Milestones(self._passed)
        self._begun: list[dist.Work] = []
        self._last = False
        self._complete: tuple[int, int] | None = None  # the last milestone, and what was put off before it

    def begin(self, last: bool) -> None:
        """A backward begins, the step's `last` one or another."""
        self._last = last

    def finish(self, device: torch.device) -> None:
        """After the last backward: gradients are the sums when this returns."""
        if self._complete is not None:
            self._sum_up(self._complete[0])
        self._sum_up(_END)
        with self._clock.over(device):
            for work in self._begun:
                work.wait()
        self._begun, self._last, self._complete = [], False, None

    def _passed(self, number: int) -> None:
        if not self._last:
            return
        if self._complete is not None:
            before, put_off = self._complete
            if self._later is not None:
                self._later.finish(put_off)
            self._sum_up(before)
        self._complete = (number, 0 if self._later is None else self._later.added)

    def _sum_up(self, number: int) -> None:
        for part, group in self._parts[number]:
            work = dist.all_reduce(part, group=group, async_op=True)
            assert work is not None
            self._begun.append(work)


def _cuts(model: DeepseekV3, group: FlatGroup) -> Iterator[tuple[int, int, int]]:
    """(milestone, begin, end): by which elements [begin, end) of the flat buffer are complete; last layers first."""
    milestones = [model.milestone_of(tensor.name) for tensor in group.logical]
    assert milestones == sorted(milestones), "parameters come in the order of the forward"
    end = group.numel
    for number in sorted({*milestones} - {_END}, reverse=True):
        begin = group.logical[milestones.index(number)].start
        if end - begin >= _LEAST:
            yield number, begin, end
            end = begin
    if end:
        yield _END, 0, end
