"""How a rank's rows reach others, while it does something else.

Everything that communicates is begun here, and ended when it is needed. Who waits computes gradients of weights that
were put off (`kernels/deferred.py`), as long as there are any. On a GPU the host is ahead of the device, so it sees a
transfer end late, and hands over all that was put off: it runs beside the transfer all the same.

Shapes: T tokens, D columns, P ranks, N bytes of a tail.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.deferred import DeferredGradients
from moray.kernels.wire import packed_width
from moray.models.expert_parallel.shared_memory import PeerMemory

# Made for a device, and entered around every wait for others: whoever wants to know what communication takes.
Timed = Callable[[torch.device], AbstractContextManager[None]]
Arrival = Callable[[], Tensor]  # waits for a transfer that is under way; what arrived


class Work(Protocol):
    """A transfer that is under way."""

    def is_completed(self) -> bool: ...
    def wait(self) -> Any: ...


def untimed(device: torch.device) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Link:
    """How this rank exchanges rows with those of `group`."""

    group: dist.ProcessGroup
    timed: Timed = untimed
    later: DeferredGradients | None = None
    memory: PeerMemory | None = None  # where all ranks are on one host

    def exchange(self, rows: Tensor, sent: Sequence[int] | None, received: Sequence[int] | None) -> Arrival:
        """Begins to send so many rows to each rank, and to receive so many; None: equal numbers, and few."""
        rows = rows.contiguous()
        if self.memory is not None and sent is not None and received is not None:
            with self.timed(rows.device):
                number = self.memory.write(torch.split(rows, list(sent)))
            return self._read(number, received, rows)
        out = rows.new_empty((sum(received), *rows.shape[1:])) if received is not None else torch.empty_like(rows)
        arriving, leaving = (None if of is None else list(of) for of in (received, sent))
        work = dist.all_to_all_single(out, rows, arriving, leaving, group=self.group, async_op=True)

        def arrived() -> Tensor:
            self.wait(work, rows.device)
            return out

        return arrived

    def push(
        self, rows_TD: Tensor, tails_TN: Tensor, goes_PT: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> Arrival:
        """Sends each row in FP8, its tail after it, to the ranks of `goes_PT`, through memory; what arrives is uint8
        [rows, bytes], as in `kernels/push.py`."""
        assert self.memory is not None
        number = self.memory.push(rows_TD, tails_TN, goes_PT, sent)
        width = packed_width(rows_TD.shape[1]) + tails_TN.shape[1]
        return self._read(number, received, torch.empty(0, width, dtype=torch.uint8))

    def _read(self, number: int, received: Sequence[int], like: Tensor) -> Arrival:
        """Says that exchange `number` is written, and reads it when all have said so."""
        memory, heard = self.memory, torch.empty(dist.get_world_size(self.group), dtype=torch.int64)
        work = dist.all_to_all_single(heard, torch.full_like(heard, number), group=self.group, async_op=True)
        like = like.new_empty(0, *like.shape[1:])

        def arrived() -> Tensor:
            assert memory is not None
            self.wait(work, heard.device)
            assert heard.eq(number).all(), "ranks are at different exchanges"
            with self.timed(heard.device):
                return memory.read(number, received, like)

        return arrived

    def wait(self, work: Work, device: torch.device) -> None:
        """Waits for a transfer, and does what was put off meanwhile."""
        if self.later is not None:
            self.later.fill(work.is_completed)
        with self.timed(device):
            work.wait()
