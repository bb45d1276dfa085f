"""A GPU's runtime without a GPU: kernels that are not launched, and streams and events that wait for nothing.

Kernels allocate their outputs and workspaces in Python before they are launched, so the functions that launch them give
the sizes. `tests/pipelines/pretrain/memory/test_kernels.py` compares these with the interpreter's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from moray.kernels.util import device
from moray.pipelines.pretrain.memory.meter import MemoryMeter


class _Event:
    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

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
