"""A world of GPUs without a GPU: kernels that are not launched, collectives that send nothing, a runtime that waits for
nothing. What remains is the code of a rank.

Kernels allocate their outputs and workspaces in Python before they are launched, so the functions that launch them give
the sizes. `tests/pipelines/pretrain/memory/test_kernels.py` compares these with the interpreter's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from moray.kernels.util import device
from moray.pipelines.pretrain.memory.meter import MemoryMeter
from moray.pipelines.pretrain.mesh import Mesh, grid

_BACKEND = "unsent"  # of torch.distributed


class _Event:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Any) -> float:
        return 0.0


class _Done:
    """Like a GPU's, it holds what the work reads until it is waited for."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self._work = [work]
        self._out = work()

    def is_completed(self) -> bool:
        return False  # a host that runs ahead sees no work completed

    def wait(self) -> torch.Tensor:
        self._work.clear()
        return self._out


class _Queue:
    def start(self, work: Callable[[], torch.Tensor]) -> device.StartedWork:
        with torch.no_grad():
            return _Done(work)


class _Runtime:
    """Implements `kernels.util.device.Runtime`."""

    runs_ahead = True

    def queue(self) -> device.WorkQueue:
        return _Queue()

    def __init__(self, meter: MemoryMeter) -> None:
        self._meter = meter

    def side_stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def event(self) -> device.Event:
        return _Event()

    def synchronize(self) -> None:
        self._meter.note("waits for the device")

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._meter.host_tensor(tuple(shape), dtype)

    def peak_bytes(self) -> int:
        return self._meter.device.peak


@contextlib.contextmanager
def no_launches() -> Iterator[None]:
    """Triton kernels are not launched."""
    kept = [(kind, kind.run) for kind in (JITFunction, InterpretedFunction)]
    for kind, _ in kept:
        kind.run = lambda *arguments, **options: None
    try:
        yield
    finally:
        for kind, run in kept:
            kind.run = run


@contextlib.contextmanager
def metered(meter: MemoryMeter) -> Iterator[None]:
    """Tensors of the meta device have the meter's runtime."""
    device.RUNTIMES["meta"] = lambda _: _Runtime(meter)
    try:
        with no_launches(), meter:
            yield
    finally:
        del device.RUNTIMES["meta"]


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
