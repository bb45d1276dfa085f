"""The rank layout: world = EDP x EP. EP groups are consecutive ranks, so that all-to-alls stay within a node if it has
enough of them.

All ranks use the dense parameters; the ranks of one EDP group use the same experts.

A rank makes only its own groups, all ranks in one order, and none of one rank. On GPUs a group has both backends: NCCL
for the device's tensors, gloo for the host's.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moray.pipelines.pretrain.stopwatch import Stopwatch
from moray.pipelines.pretrain.validate import check_layout
from moray.platform.core.ports import free_port

T = TypeVar("T")

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


@dataclass(frozen=True)
class Mesh:
    """This rank's position and process groups.

    ep_group: ranks that partition the experts. edp_group: ranks with the same experts. Both are None if they have one
    rank. io_group: all ranks over gloo, for work beside training, such as checkpoints. clock: measures exposed
    communication.

    dense: consecutive ranks that share dense weights, all by default. dense_groups: these ranks, and those with the
    same share, if neither is all ranks. node_groups: the ranks of the EP group with this one's number in their node,
    and the ranks of this node, if tokens are dispatched in two hops.
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
    node_groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None

    @classmethod
    def create(cls, ep: int, device: torch.device, dense: int = 0, node_ranks: int | None = None) -> Mesh:
        """Creates this rank's groups. torch.distributed must be initialised.

        node_ranks: ranks of a node, for dispatch in two hops (default: as the ranks find them; 1: one hop). Each group
        runs one collective here, because NCCL sets a group up at its first collective. Later, memory would be full and
        the ranks would reach that collective at different times.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        check_layout(world, ep)
        dense = dense or world
        _ready(dist.group.WORLD, device)
        ep_group, edp_group = _grid(rank, world, ep, "experts", device)
        dense_groups = node_groups = None
        if 1 < dense < world:
            dense_groups = _both(_grid(rank, world, dense, "dense weights", device))
        width = node_ranks or _ranks_of_nodes(ep_group, device)
        if 1 < width < ep and ep % width == 0:
            within, between = _both(_grid(rank, ep, width, "experts of a node", device))
            node_groups = between, within
        io_group = dist.new_group(backend="gloo", group_desc="checkpoints")
        _ready(io_group, torch.device("cpu"))
        clock = Stopwatch()
        return cls(rank, world, ep, ep_group, edp_group, io_group, clock, dense, dense_groups, node_groups)

    @staticmethod
    def shrink(world: int, device: torch.device) -> bool:
        """Makes the first `world` ranks the whole process group. Returns False on the other ranks, which leave it."""
        rank, backend = dist.get_rank(), dist.get_backend_config()
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

    def to_first(self, mine: T) -> list[T]:
        """Gathers a value of every rank on rank 0, in the order of ranks. Returns an empty list on the other ranks."""
        if self.io_group is None:
            return [mine]
        found: list[Any] = [None] * self.world if self.rank == 0 else []
        dist.gather_object(mine, found or None, 0, self.io_group)
        return found

    @property
    def edp(self) -> int:
        return self.world // self.ep

    def experts(self, count: int) -> range:
        """The experts this rank holds."""
        each = count // self.ep
        first = (self.rank % self.ep) * each
        return range(first, first + each)


def grid(rank: int, ranks: int, width: int) -> tuple[range, range]:
    """This rank's row and column, if each `ranks` consecutive ranks are a grid with rows of `width`."""
    begin = rank - rank % ranks
    row = rank - rank % width
    return range(row, row + width), range(begin + (rank - begin) % width, begin + ranks, width)


def _grid(
    rank: int, ranks: int, width: int, purpose: str, device: torch.device
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The groups of this rank's row and column in a grid."""
    row, column = grid(rank, ranks, width)
    return _group(row, purpose, device), _group(column, f"copies of {purpose}", device)


def _group(ranks: range, purpose: str, device: torch.device) -> dist.ProcessGroup | None:
    """Only these ranks make the group: if all ranks made all groups, 2,048 ranks would meet for each of hundreds. The
    group knows its GPU, and the world's does not: torch would split new groups off it, for which all ranks meet."""
    if len(ranks) == 1:
        return None
    gpu = None if device.type == "cpu" else device
    group = dist.new_group(list(ranks), group_desc=purpose, use_local_synchronization=True, device_id=gpu)
    _ready(group, device)
    return group


def _ready(group: dist.ProcessGroup | None, device: torch.device) -> None:
    dist.all_reduce(torch.zeros(1, device=device), group=group)


def _both(
    groups: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None],
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    row, column = groups
    assert row is not None
    assert column is not None
    return row, column


def _ranks_of_nodes(ep_group: dist.ProcessGroup | None, device: torch.device) -> int:
    """Ranks of each node, if all nodes of all EP groups have as many and they are consecutive; else 1."""
    if ep_group is None:
        return 1
    mine = torch.tensor([host_number()], device=device)
    hosts = torch.empty(dist.get_world_size(ep_group), dtype=torch.int64, device=device)
    _all_gather(hosts, mine, group=ep_group)
    width = even_runs(hosts.tolist())
    bounds = torch.tensor([width, -width], device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    largest, smallest = bounds.tolist()
    return int(largest) if largest == -smallest else 1


def even_runs(hosts: Sequence[int]) -> int:
    """The length of the runs of equal numbers, if all have one length and no number has two runs; else 1."""
    runs = [(host, len(list(same))) for host, same in itertools.groupby(hosts)]
    lengths = {length for _, length in runs}
    return lengths.pop() if len(lengths) == 1 and len({host for host, _ in runs}) == len(runs) else 1


def host_number() -> int:
    """The same for processes of one host, also in different containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = boot.read_text() if boot.exists() else socket.gethostname()
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
