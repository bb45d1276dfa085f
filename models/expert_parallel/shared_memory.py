"""Shared memory through which the ranks of one host exchange rows, instead of through sockets.

Each rank has a file in memory, with an inbox for each rank of its group, and all ranks map it. The file has no name, so
nothing remains however a process ends. It uses memory only for written pages, so the inboxes may be arbitrarily large.

A rank announces a write by a collective. So monitoring of collectives sees it, and it fails if a peer is gone. There
are SETS sets of inboxes, used in rotation. At most IN_FLIGHT exchanges are between their write and their read, and
reads are in the order of writes. So exchange n is written after the announcements of exchange n - IN_FLIGHT were
received. By then its peers had read all exchanges before n - 2 * IN_FLIGHT, so no inbox is overwritten before it is
read.
"""

import contextlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moray.kernels.push import push_rows
from moray.kernels.wire import packed_width

IN_FLIGHT = 2
SETS = 2 * IN_FLIGHT
_INBOX = 1 << 32  # bytes of address space


class PeerMemory:
    """Inboxes of a group's ranks. `files`: those of all ranks, in order, uint8."""

    def __init__(self, rank: int, files: Sequence[Tensor]) -> None:
        self._rank, self._files = rank, files
        self._written = self._read = 0

    def write(self, parts: Sequence[Tensor]) -> int:
        """Writes contiguous rows for each rank; returns the number of this exchange."""
        for inbox, rows in zip(self._inboxes([rows.nbytes for rows in parts]), parts, strict=True):
            inbox.copy_(rows.reshape(-1).view(torch.uint8))
        return self._next()

    def push(self, rows_TD: Tensor, metadata_TN: Tensor, sent_PT: Tensor, counts: Sequence[int]) -> int:
        """Writes rows in FP8, with their metadata, for each rank (`kernels/push.py`). counts: rows for each rank."""
        width = packed_width(rows_TD.shape[1]) + metadata_TN.shape[1]
        inboxes = [inbox.view(-1, width) for inbox in self._inboxes([count * width for count in counts])]
        push_rows(rows_TD, metadata_TN, sent_PT, inboxes)
        return self._next()

    def read(self, number: int, counts: Sequence[int], like: Tensor) -> Tensor:
        """Reads `counts[p]` rows from each rank p, of exchange `number`, once all ranks have announced it. `like` has
        the rows' trailing shape and dtype."""
        assert number == self._read, "exchanges are read in the order of writes"
        self._read += 1
        width = like.shape[1:].numel() * like.element_size()
        parts = [self._place(self._rank, sender, number)[: count * width] for sender, count in enumerate(counts)]
        return torch.cat(parts).view(like.dtype).view(-1, *like.shape[1:])

    def _inboxes(self, sizes: Sequence[int]) -> list[Tensor]:
        """For every rank, the inbox of this rank's next exchange, cut to the given size in bytes."""
        if self._written - self._read == IN_FLIGHT:
            raise RuntimeError(f"more than {IN_FLIGHT} exchanges are in flight")
        if max(sizes) > _INBOX:
            raise RuntimeError(f"{max(sizes)} bytes for one rank exceed {_INBOX}: use smaller micro-batches")
        return [self._place(peer, self._rank, self._written)[:size] for peer, size in enumerate(sizes)]

    def _place(self, owner: int, sender: int, number: int) -> Tensor:
        begin = (number % SETS * len(self._files) + sender) * _INBOX
        return self._files[owner][begin : begin + _INBOX]

    def _next(self) -> int:
        self._written += 1
        return self._written - 1


def connect(group: dist.ProcessGroup) -> PeerMemory | None:
    """The shared memory of a gloo group's ranks, which must all call this. None on all ranks if any rank cannot write
    to any other's."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    with contextlib.ExitStack() as stack:
        descriptor = _create(SETS * ranks * _INBOX)
        if descriptor is not None:
            stack.callback(os.close, descriptor)
        places: list[tuple[str, str] | None] = [None] * ranks
        mine = None if descriptor is None else (_host(), f"/proc/{os.getpid()}/fd/{descriptor}")
        dist.all_gather_object(places, mine, group)
        files = [_map(place) for place in places]
        missing = torch.tensor(sum(file is None for file in files))
        dist.all_reduce(missing, group=group)  # after this, the files need no descriptor
    return None if missing else PeerMemory(rank, [file for file in files if file is not None])


def _create(size: int) -> int | None:
    """Descriptor of a file in memory. None if the system has no such files (other than Linux)."""
    if not hasattr(os, "memfd_create"):
        return None
    descriptor = None
    try:
        descriptor = os.memfd_create("moray-inboxes")
        os.truncate(descriptor, size)
    except OSError:  # not allowed, or above the limit on file size
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _host() -> str:
    """An identifier that is equal for processes that see each other and share a network namespace."""
    names = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
    return " ".join((Path("/proc/sys/kernel/random/boot_id").read_text().strip(), *names))


def _map(place: tuple[str, str] | None) -> Tensor | None:
    if place is None or place[0] != _host():
        return None
    try:
        with open(place[1], "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
    except (OSError, ValueError):  # no permission, or above the process's limit on address space
        return None
    return torch.from_numpy(np.frombuffer(memory, np.uint8))
