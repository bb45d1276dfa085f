"""What code needs of a device beside its tensors: streams, events, pinned memory, and the memory in use.

Code asks `runtime(device)` instead of testing for CUDA, so that it has one form for all devices. The CPU's runtime has
nothing to wait for.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a device's work."""

    def record(self) -> None:
        """Sets the point: the end of the work that was issued so far."""

    def query(self) -> bool:
        """Whether the device has reached the point."""

    def synchronize(self) -> None:
        """Waits until the device has reached the point."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this point to another."""


class StartedWork(Protocol):
    """Work of a `WorkQueue`, and the tensor it makes."""

    def is_completed(self) -> bool:
        """Whether `wait` would not block."""

    def wait(self) -> Tensor:
        """Orders what follows on the current stream after the work; on the CPU, blocks until it has ended. Raises the
        work's error. Called once."""


class WorkQueue(Protocol):
    """Runs work beside the caller's, one at a time and in order. After an error, all later work raises it."""

    def start(self, work: Callable[[], Tensor]) -> StartedWork:
        """Starts `work` without autograd, after all work that was issued so far."""


class Runtime(Protocol):
    """The runtime of one device.

    runs_ahead: whether the host issues work and does not wait for it.
    """

    runs_ahead: bool

    def queue(self) -> WorkQueue:
        """A new queue."""

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

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "_HostEvent") -> float:
        return (end._at - self._at) * 1e3


class _ThreadWork:
    def __init__(self, future: "Future[Tensor]") -> None:
        self._future = future

    def is_completed(self) -> bool:
        return self._future.done()

    def wait(self) -> Tensor:
        return self._future.result()


class _ThreadQueue:
    """A daemon thread, so that a process can end while its work waits for another process."""

    def __init__(self) -> None:
        self._works: SimpleQueue[tuple[Callable[[], Tensor], Future[Tensor]] | None] = SimpleQueue()
        threading.Thread(target=_run_works, args=(self._works,), name="queue", daemon=True).start()

    def __del__(self) -> None:
        self._works.put(None)

    def start(self, work: Callable[[], Tensor]) -> StartedWork:
        future: Future[Tensor] = Future()
        self._works.put((work, future))
        return _ThreadWork(future)


@torch.no_grad()
def _run_works(works: "SimpleQueue[tuple[Callable[[], Tensor], Future[Tensor]] | None]") -> None:
    """After an error no work runs: its collectives would meet others of the peers, which are still before the error."""
    failed: BaseException | None = None
    while (one := works.get()) is not None:
        work, future = one
        try:
            if failed is not None:
                raise failed
            future.set_result(work())
        except BaseException as error:
            failed = error
            future.set_exception(error)
        del one, work, future  # and with them the tensors


class HostRuntime:
    runs_ahead = False

    def queue(self) -> WorkQueue:
        return _ThreadQueue()

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


class _StreamWork:
    """Work that was issued to a stream. `work` holds the tensors that it reads: their memory belongs to the stream that
    waits, and may be used again only after it has waited."""

    def __init__(self, work: Callable[[], Tensor], out: Tensor, device: torch.device) -> None:
        self._work: Callable[[], Tensor] | None = work
        self._out, self._device = out, device
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def is_completed(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        torch.cuda.current_stream(self._device).wait_event(self._event)
        self._work = None
        return self._out


class _StreamQueue:
    """A stream. Work begins after the caller's stream has done what was issued to it. So when work allocates memory
    that an earlier result used, the caller's stream has read the result."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, work: Callable[[], Tensor]) -> StartedWork:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.no_grad(), torch.cuda.stream(self._stream):
            return _StreamWork(work, work(), self._device)


class CudaRuntime:
    runs_ahead = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def queue(self) -> WorkQueue:
        return _StreamQueue(self._device)

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
