"""A world of GPUs without them: collectives that send nothing, between ranks of which only one exists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from moray.pipelines.pretrain.mesh import Mesh, grid

_BACKEND = "unsent"  # of torch.distributed


@contextlib.contextmanager
def unsent_group(rank: int, world: int) -> Iterator[None]:
    """A process group of `world` ranks of which only this one exists."""
    if _BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(
            _BACKEND, lambda _, rank, size, __: FakeProcessGroup._create_internal(rank, size), devices=["cpu", "meta"]
        )
    dist.init_process_group(_BACKEND, store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def unsent_mesh(rank: int, world: int, ep: int, dense: int, node_ranks: int) -> Mesh:
    """The mesh of one rank in `unsent_group`. node_ranks: 1 for dispatch in one hop."""
    ep_group, edp_group = _row_and_column(rank, world, ep)
    groups = _row_and_column(rank, world, dense) if 1 < dense < world else None
    nodes = None
    if 1 < node_ranks < ep:
        within, between = _row_and_column(rank, ep, node_ranks)
        nodes = between, within
    return Mesh(rank, world, ep, ep_group, edp_group, dense=dense, dense_groups=groups, node_groups=nodes)


def _row_and_column(rank: int, ranks: int, width: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    row, column = (dist.new_group(list(line)) for line in grid(rank, ranks, width))
    return row, column
