"""An exponential moving average of the weights, kept on the CPU (DeepSeek-V3 §3.2.3).

Every rank averages the masters that it owns, so the average takes four bytes per parameter over all ranks together. The
half-life is in tokens, so another batch size does not change it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from moray.kernels.util.device import Event, runtime
from moray.pipelines.pretrain.optim.optimizer import Fragment, ShardedOptimizer

KIND = "ema"


class Ema:
    """A weight of `half_life` tokens ago counts half. `restart` makes the average a copy of the weights."""

    def __init__(self, optimizer: ShardedOptimizer, half_life: int) -> None:
        owned = [fragment for fragment in optimizer.fragments(owned=True) if fragment.kind == "master"]
        self._half_life = half_life
        self._masters = [fragment.tensor for fragment in owned]
        self._device = self._masters[0].device if self._masters else torch.device("cpu")
        self._averages = [self._host_tensor(master) for master in self._masters]
        self._fragments = [
            Fragment(KIND, fragment.name, fragment.offset, fragment.total, average)
            for fragment, average in zip(owned, self._averages, strict=True)
        ]
        # On a GPU, the end of each step copies the masters, and a thread averages them during the next step.
        self._in_place = self._device.type == "cpu"
        self._copies = [] if self._in_place else [self._host_tensor(master) for master in self._masters]
        self._thread = ThreadPoolExecutor(1, "ema")
        self._running: Future[None] | None = None

    def restart(self) -> None:
        """Makes the average a copy of the masters."""
        self._wait()
        for average, master in zip(self._averages, self._masters, strict=True):
            average.copy_(master)

    def update(self, tokens: int) -> None:
        """Averages in the masters after a step of `tokens` tokens."""
        self._wait()
        weight = 1 - 0.5 ** (tokens / self._half_life)
        if self._in_place:
            torch._foreach_lerp_(self._averages, self._masters, weight)
            return
        for copy, master in zip(self._copies, self._masters, strict=True):
            copy.copy_(master, non_blocking=True)
        copied = runtime(self._device).event()
        copied.record()
        self._running = self._thread.submit(self._average, copied, weight)

    def fragments(self) -> Iterator[Fragment]:
        """The averages of the masters that this rank owns; live memory, unchanged until the next update."""
        self._wait()
        yield from self._fragments

    def _host_tensor(self, master: torch.Tensor) -> torch.Tensor:
        return runtime(self._device).host_tensor(master.shape, master.dtype)

    def _average(self, copied: Event, weight: float) -> None:
        copied.synchronize()
        torch._foreach_lerp_(self._averages, self._copies, weight)

    def _wait(self) -> None:
        if self._running:
            self._running.result()
            self._running = None
