"""Asynchronous all-to-all of rows with per-rank counts, by collectives or through shared memory.

A caller starts a transfer, does other work, and calls `wait` when it needs the rows. While waiting, a rank computes
deferred weight gradients (`kernels/util/deferred.py`), if there are any. On a GPU the host runs ahead of the device and
sees the end of a transfer late, so it launches all deferred gradients; they still overlap with the transfer.

Shapes: T tokens, D columns, P ranks, N bytes of metadata of a token.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.util.deferred import DeferredGradients
from moray.kernels.util.device import StartedWork, WorkQueue
from moray.kernels.wire import packed_width
from moray.models.expert_parallel.shared_memory import PeerMemory

# Returns a context manager for a device, entered around every wait, to measure exposed communication.
Timed = Callable[[torch.device], AbstractContextManager[None]]


class Transfer(Protocol):
    """A transfer in flight, like torch.distributed's `Work`."""

    def is_completed(self) -> bool: ...
    def wait(self) -> Any: ...


class PendingRows(Protocol):
    """Rows in flight."""

    def wait(self) -> Tensor:
        """Blocks until the rows are received; called once."""


def untimed(device: torch.device) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class AllToAll:
    """Exchanges rows between the ranks of `group`: through `memory`, if all ranks share a host, or by collectives.
    `deferred`: weight gradients to compute while waiting."""

    group: dist.ProcessGroup
    timed: Timed = untimed
    deferred: DeferredGradients | None = None
    memory: PeerMemory | None = None

    def beside(self) -> "AllToAll":
        """For transfers that are waited for on another stream: deferred gradients must not run there, and the wait is
        not exposed communication."""
        return AllToAll(self.group)

    def start(self, rows: Tensor, send_counts: Sequence[int] | None, recv_counts: Sequence[int] | None) -> PendingRows:
        """Starts sending `send_counts[p]` rows to rank p and receiving `recv_counts[p]` from it. None means equal
        shares, which are small and always use a collective."""
        rows = rows.contiguous()
        if self.memory is not None and send_counts is not None and recv_counts is not None:
            with self.timed(rows.device):
                number = self.memory.write(torch.split(rows, list(send_counts)))
            return self._announce(number, recv_counts, rows)
        out = rows.new_empty((sum(recv_counts), *rows.shape[1:])) if recv_counts is not None else torch.empty_like(rows)
        receiving, sending = (None if counts is None else list(counts) for counts in (recv_counts, send_counts))
        transfer = dist.all_to_all_single(out, rows, receiving, sending, group=self.group, async_op=True)
        return _PendingCollective(self, transfer, out)

    def start_fp8(
        self,
        rows_TD: Tensor,
        metadata_TN: Tensor,
        sent_PT: Tensor,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
    ) -> PendingRows:
        """Starts sending each row, quantized to FP8 and followed by its metadata, to the ranks of `sent_PT`, through
        shared memory. The received rows are uint8 [rows, bytes], in the layout of `kernels/push.py`."""
        assert self.memory is not None
        number = self.memory.push(rows_TD, metadata_TN, sent_PT, send_counts)
        width = packed_width(rows_TD.shape[1]) + metadata_TN.shape[1]
        return self._announce(number, recv_counts, torch.empty(0, width, dtype=torch.uint8))

    def later(self, queue: WorkQueue, work: Callable[[], Tensor], device: torch.device) -> PendingRows:
        """Starts transfers that `queue` runs; `work` returns the rows of the last one."""
        return _PendingWork(self, queue.start(work), device)

    def wait(self, transfer: Transfer, device: torch.device) -> Any:
        """Computes deferred gradients until the transfer is complete, then waits for it and returns its result."""
        if self.deferred is not None:
            self.deferred.fill(transfer.is_completed)
        with self.timed(device):
            return transfer.wait()

    def _announce(self, number: int, recv_counts: Sequence[int], like: Tensor) -> PendingRows:
        """Notifies all ranks, by a small collective, that exchange `number` of this rank is written."""
        assert self.memory is not None
        received = torch.empty(dist.get_world_size(self.group), dtype=torch.int64)
        transfer = dist.all_to_all_single(received, torch.full_like(received, number), group=self.group, async_op=True)
        return _PendingRead(
            self, self.memory, transfer, received, number, recv_counts, like.new_empty(0, *like.shape[1:])
        )


@dataclass(frozen=True)
class _PendingWork:
    """Rows that a queue's work returns."""

    owner: AllToAll
    work: StartedWork
    device: torch.device

    def wait(self) -> Tensor:
        rows: Tensor = self.owner.wait(self.work, self.device)
        return rows


@dataclass(frozen=True)
class _PendingCollective:
    """Rows that a collective writes to `out`."""

    owner: AllToAll
    transfer: Transfer
    out: Tensor

    def wait(self) -> Tensor:
        self.owner.wait(self.transfer, self.out.device)
        return self.out


@dataclass(frozen=True)
class _PendingRead:
    """Rows in shared memory, complete once all ranks have announced exchange `number`."""

    owner: AllToAll
    memory: PeerMemory
    transfer: Transfer
    received_P: Tensor
    number: int
    recv_counts: Sequence[int]
    like: Tensor

    def wait(self) -> Tensor:
        device = self.received_P.device
        self.owner.wait(self.transfer, device)
        assert self.received_P.eq(self.number).all(), "ranks are at different exchanges"
        with self.owner.timed(device):
            return self.memory.read(self.number, self.recv_counts, self.like)
