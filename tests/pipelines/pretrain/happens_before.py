"""A training step on recorded streams: what each operation reads and writes, and after which waits.

The step is the product's, on the meta device, as the memory planner runs it. Streams, events and collectives are
stand-ins that only keep order: every stream has a vector clock, and a wait merges another's. The queue of two-hop
dispatch is that of CUDA, on these streams. As with NCCL, a collective
runs on its group's own stream, after the work that its caller had issued, and `wait` orders the waiting stream after
it; until then torch holds its tensors. As with torch's caching allocator, freed memory may be used again at once by the
stream that allocated it. A copy to the host waits: what is issued later comes after it on all streams.

An access is a hazard if it is not ordered after the last write of the same elements, or a write not after all reads of
them: a collective may sum a part of a buffer while others are written. So is an operation of the stream that allocated
a freed tensor, if another stream's access to that tensor is not ordered before it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from moray.kernels.util import device
from moray.kernels.util.deferred import DeferredGradients
from moray.pipelines.pretrain.optim import unit

Clock = Counter[str]  # by stream, how many of its operations come before
MAIN = "main"
_ALL = 1 << 62


Access = tuple[str, int, int]  # stream, first element, end


@dataclass
class Storage:
    """home: the stream that allocated it. writes and reads: the number of the last operation of each access that no
    later write covers."""

    home: str
    writes: dict[Access, int] = field(default_factory=dict)
    reads: dict[Access, int] = field(default_factory=dict)
    name: str = ""

    def accesses(self, begin: int, end: int, written: bool = False) -> list[tuple[str, int]]:
        """(stream, number) of the accesses to some elements; with `written`, of the writes only."""
        found = self.writes.items() if written else [*self.writes.items(), *self.reads.items()]
        return [(stream, number) for (stream, first, last), number in found if first < end and begin < last]

    def write(self, access: Access, number: int) -> None:
        _, begin, end = access
        for accesses in (self.writes, self.reads):
            for covered in [one for one in accesses if begin <= one[1] and one[2] <= end]:
                del accesses[covered]
        self.writes[access] = number


class Streams(TorchDispatchMode):
    """Records the operations within; `hazards` names what is not ordered."""

    def __init__(self) -> None:
        super().__init__()
        self.hazards: list[str] = []
        self.operations: Counter[str] = Counter()  # by stream
        self._clocks: dict[str, Clock] = {MAIN: Clock()}
        self._stack = [MAIN]
        self._made = 0
        self._host = Clock()  # what the host has waited for
        self._freed: dict[str, list[Storage]] = {}  # by stream that allocated, since its last operation
        self._storages: dict[int, Storage] = {}
        self._references: dict[int, Any] = {}

    @property
    def current(self) -> str:
        return self._stack[-1]

    def new_stream(self, kind: str) -> str:
        self._made += 1
        name = f"{kind} {self._made}"
        self._clocks[name] = Clock()
        return name

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        self._stack.append(stream)
        try:
            yield
        finally:
            self._stack.pop()

    def now(self, stream: str) -> Clock:
        """An event: the end of what was issued to the stream."""
        return Clock(self._clocks[stream])

    def wait(self, stream: str, event: Clock) -> None:
        self._clocks[stream] |= event

    def access(self, name: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """One operation of the current stream."""
        stream = self.current
        self.operations[stream] += 1
        self.wait(stream, self._host)
        for storage in self._freed.pop(stream, []):
            self._check(name, "may take the memory of", storage, storage.accesses(0, _ALL))
        self._clocks[stream][stream] += 1
        number = self._clocks[stream][stream]
        for tensor in reads:
            storage, (begin, end) = self._storage(tensor), _extent(tensor)
            self._check(name, "reads", storage, storage.accesses(begin, end, written=True))
            storage.reads[stream, begin, end] = number
        for tensor in writes:
            storage, (begin, end) = self._storage(tensor), _extent(tensor)
            self._check(name, "writes", storage, storage.accesses(begin, end))
            storage.write((stream, begin, end), number)
            storage.name = storage.name or name

    def _check(self, name: str, does: str, storage: Storage, before: list[tuple[str, int]]) -> None:
        for other, number in before:
            if self._clocks[self.current][other] < number:
                self.hazards.append(f"{name} on {self.current} {does} what {storage.name} made, before {other} is done")

    def _storage(self, tensor: Tensor) -> Storage:
        untyped = tensor.untyped_storage()
        key = untyped._cdata
        if key not in self._storages:
            self._storages[key] = Storage(self.current)

            def freed(_: Any) -> None:
                storage = self._storages.pop(key)
                del self._references[key]
                self._freed.setdefault(storage.home, []).append(storage)

            self._references[key] = weakref.ref(untyped, freed)
        return self._storages[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" or func.is_view:
            return out
        if not _tensors([out]) and _tensors(args):
            self._host |= self._clocks[self.current]  # a read by the host
        given = [*args, *(kwargs or {}).values()]
        schema = func._schema.arguments
        mutated = [
            value
            for argument, value in zip(schema, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        reads = [tensor for tensor in _tensors(given) if not any(tensor is one for one in _tensors(mutated))]
        allocates = "empty" in func.name()
        self.access(func.name(), reads, [] if allocates else [*_tensors(mutated), *_tensors([out])])
        if allocates:
            for tensor in _tensors([out]):
                self._storage(tensor)
        return out

    def launch(self, kernel: Any, arguments: Sequence[Any]) -> None:
        """A Triton kernel. It may write all its tensors: nothing says which, and no two streams read one at once."""
        self.access(getattr(kernel, "__name__", "a kernel"), [], _tensors(arguments))


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first of its storage's elements, and the end."""
    begin = tensor.storage_offset()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return begin, begin + (1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The meta tensors among values, which may be in lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found += [value] if value.is_meta else []
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


class Transfer:
    """A collective, as `Work`. Holds its tensors until it is waited for."""

    def __init__(self, streams: Streams, event: Clock, tensors: Sequence[Tensor]) -> None:
        self._streams, self._event, self._tensors = streams, event, tensors

    def is_completed(self) -> bool:
        return False

    def wait(self) -> None:
        self._streams.wait(self._streams.current, self._event)
        self._tensors = ()


class Event:
    """As `torch.cuda.Event`."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.at = Clock()

    def record(self) -> None:
        self.at = self._streams.now(self._streams.current)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Any) -> float:
        return 0.0


class Stream:
    """As `torch.cuda.Stream`."""

    def __init__(self, streams: Streams) -> None:
        self._streams, self.name = streams, streams.new_stream("queue")

    def wait_stream(self, other: Stream) -> None:
        self._streams.wait(self.name, self._streams.now(other.name))

    def wait_event(self, event: Event) -> None:
        self._streams.wait(self.name, event.at)


class Current(Stream):
    """The stream that operations are issued to."""

    def __init__(self, streams: Streams) -> None:
        self._streams, self.name = streams, streams.current


class Runtime:
    """Implements `device.Runtime`."""

    runs_ahead = True

    def __init__(self, streams: Streams, host: Callable[[Sequence[int], torch.dtype], Tensor]) -> None:
        self._streams, self.host_tensor = streams, host

    def queue(self) -> device.WorkQueue:
        return device._StreamQueue(torch.device("meta"))

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        with self._streams.on(self._streams.new_stream("side")):
            yield

    def event(self) -> Event:
        return Event(self._streams)

    def synchronize(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 0


@contextmanager
def recorded(streams: Streams) -> Iterator[None]:
    """Collectives and kernels are recorded; deferred gradients may only run on the main stream."""
    original = device.RUNTIMES["meta"](torch.device("meta"))
    by_group: dict[Any, str] = {}

    def collective(call: Any, written: int, read: int) -> Any:
        def run(*arguments: Any, **options: Any) -> Transfer:
            call(*arguments, **options)
            group = options.get("group")
            stream = by_group.setdefault(group, streams.new_stream("collectives"))
            streams.wait(stream, streams.now(streams.current))
            inputs, outputs = [arguments[read]], [arguments[written]]
            with streams.on(stream):
                streams.access(call.__name__, inputs if read != written else [], outputs)
            transfer = Transfer(streams, streams.now(stream), [*inputs, *outputs])
            if not options.get("async_op"):
                transfer.wait()
            return transfer

        return run

    fill = DeferredGradients.fill

    def fill_main(self: DeferredGradients, done: Callable[[], bool]) -> None:
        if len(self) and streams.current != MAIN:
            streams.hazards.append(f"deferred gradients run on {streams.current}")
        fill(self, done)

    def launch(kernel: Any, *arguments: Any, **options: Any) -> None:
        streams.launch(kernel, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda _: Stream(streams))
        patch.setattr(torch.cuda, "Event", lambda: Event(streams))
        patch.setattr(torch.cuda, "current_stream", lambda _: Current(streams))
        patch.setattr(torch.cuda, "stream", lambda stream: streams.on(stream.name))
        patch.setitem(device.RUNTIMES, "meta", lambda _: Runtime(streams, original.host_tensor))
        patch.setattr(dist, "all_to_all_single", collective(dist.all_to_all_single, 0, 1))
        patch.setattr(dist, "all_reduce", collective(dist.all_reduce, 0, 0))
        patch.setattr(unit, "_all_gather", collective(unit._all_gather, 0, 1))
        patch.setattr(unit, "_reduce_scatter", collective(unit._reduce_scatter, 0, 1))
        patch.setattr(DeferredGradients, "fill", fill_main)
        for kind in (JITFunction, InterpretedFunction):
            patch.setattr(kind, "run", launch)
        with streams:
            yield
