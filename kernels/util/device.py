"""What code needs of a device beside its tensors: streams, events, pinned memory, and the memory in use.

Code asks `runtime(device)` instead of testing for CUDA, so that it has one form for all devices. The CPU's runtime has
nothing to wait for.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a device's work."""

    def record(self) -> None:
        """Sets the point: the end of the work that was issued so far."""

    def synchronize(self) -> None:
        """Waits until the device has reached the point."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this point to another."""


class Runtime(Protocol):
    """The runtime of one device."""

    def side_stream(self) -> AbstractContextManager[Any]:
        """A context whose work runs beside the current stream. A copy to the host in it waits for this work only."""

    def event(self) -> Event: ...

    def synchronize(self) -> None:
        """Waits for all work of the device."""

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An unset tensor on the host, which copies of the device can fill without blocking it."""

    def peak_bytes(self) -> int:
        """The largest memory use of this process on the device so far; on the CPU, its use now."""


class _HostEvent:
    def __init__(self) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "_HostEvent") -> float:
        return (end._at - self._at) * 1e3


class HostRuntime:
    def side_stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def event(self) -> Event:
        return _HostEvent()

    def synchronize(self) -> None:
        pass

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def peak_bytes(self) -> int:
        import psutil

        used: int = psutil.Process().memory_info().rss
        return used


class CudaRuntime:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def side_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


RUNTIMES: dict[str, Callable[[torch.device], Runtime]] = {"cpu": lambda device: HostRuntime(), "cuda": CudaRuntime}


def runtime(device: torch.device) -> Runtime:
    """The runtime of a device."""
    return RUNTIMES[device.type](device)
