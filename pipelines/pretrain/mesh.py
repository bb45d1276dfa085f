"""The rank layout: world = EDP x EP. EP groups are consecutive ranks, so that all-to-alls stay within a node if it has
enough of them.

All ranks use the dense parameters; the ranks of one EDP group use the same experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moray.pipelines.pretrain.stopwatch import Stopwatch
from moray.pipelines.pretrain.validate import check_layout
from moray.platform.core.ports import free_port

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """This rank's position and process groups.

    ep_group: ranks that partition the experts. edp_group: ranks with the same experts. io_group: all ranks over gloo,
    for work beside training, such as checkpoints. All groups are None in a process without other ranks. clock: measures
    exposed communication on rank 0, which reports it.

    dense: consecutive ranks that share dense weights, all by default. dense_groups: these ranks, and those with the
    same share, if neither is all ranks.
    """

    rank: int
    world: int
    ep: int
    ep_group: dist.ProcessGroup | None
    edp_group: dist.ProcessGroup | None
    io_group: dist.ProcessGroup | None = None
    clock: Stopwatch = field(default_factory=Stopwatch)
    dense: int = 0
    dense_groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None

    @classmethod
    def create(cls, ep: int, device: torch.device, dense: int = 0) -> Mesh:
        """Creates all groups on all ranks, in one order. torch.distributed must be initialised.

        Each group runs one collective here, because NCCL sets a group up at its first collective. Later, memory would
        be full and the ranks would reach that collective at different times.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        check_layout(world, ep)
        dense = dense or world
        ep_group, edp_group = _grid(rank, world, ep, "experts")
        groups = [dist.group.WORLD, ep_group, edp_group]
        dense_groups = None
        if 1 < dense < world:
            dense_groups = _grid(rank, world, dense, "dense weights")
            groups += dense_groups
        for group in groups:
            dist.all_reduce(torch.zeros(1, device=device), group=group)
        io_group = dist.new_group(backend="gloo", group_desc="checkpoints")
        dist.all_reduce(torch.zeros(1), group=io_group)
        clock = Stopwatch(on=rank == 0)
        return cls(rank, world, ep, ep_group, edp_group, io_group, clock, dense, dense_groups)

    @staticmethod
    def shrink(world: int, device: torch.device) -> bool:
        """Makes the first `world` ranks the whole process group. Returns False on the other ranks, which leave it."""
        rank, backend = dist.get_rank(), dist.get_backend()
        address: list[Any] = [f"tcp://{os.environ['MASTER_ADDR']}:{free_port()}" if rank == 0 else None]
        dist.broadcast_object_list(address, 0, device=device)
        dist.destroy_process_group()
        if rank < world:
            dist.init_process_group(backend, init_method=address[0], rank=rank, world_size=world)
        return rank < world

    @classmethod
    def alone(cls) -> Mesh:
        """The mesh of a single process."""
        return cls(0, 1, 1, None, None)

    def from_first(self, read: Callable[[], T]) -> T:
        """Broadcasts the result of `read`, which only rank 0 calls."""
        if self.io_group is None:
            return read()
        found: list[Any] = [read() if self.rank == 0 else None]
        dist.broadcast_object_list(found, 0, self.io_group)
        value: T = found[0]
        return value

    @property
    def edp(self) -> int:
        return self.world // self.ep

    def experts(self, count: int) -> range:
        """The experts this rank holds."""
        each = count // self.ep
        first = (self.rank % self.ep) * each
        return range(first, first + each)


def _grid(rank: int, world: int, width: int, purpose: str) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's groups in a grid of rows of `width` consecutive ranks: its row, and its column."""
    rows = [list(range(start, start + width)) for start in range(0, world, width)]
    columns = [list(range(offset, world, width)) for offset in range(width)]
    mine = []
    for name, lines in ((purpose, rows), (f"copies of {purpose}", columns)):
        for ranks in lines:
            group = dist.new_group(ranks, group_desc=name)
            if rank in ranks:
                mine.append(group)
    row, column = mine
    return row, column
