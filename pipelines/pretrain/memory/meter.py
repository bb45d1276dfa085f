"""Follows the memory of a program whose tensors are on the meta device, which have sizes but no data.

The program takes the code path of a GPU. Every storage is followed from the operation that creates it until nothing
refers to it, like a block of torch's caching allocator. Where the program reads a number of a tensor on the host, a GPU
would have to finish its work first. Such reads are recorded, and answered with ones or with `answers`.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = f"{Path(__file__).parents[3]}/"
_SOURCES = tuple(f"{_ROOT}{package}/" for package in ("kernels", "models", "actors", "pipelines", "platform"))
_OWN = str(Path(__file__).parent)
_BLOCK = 512  # torch's caching allocator rounds sizes up to this

UNCOUNTED = "on the meta device in training too"  # where the model is built before the optimizer allocates it

# The innermost of these functions that is running when a storage is created says what the storage is for: file ->
# function -> part. "*" stands for the other functions of the file.
PARTS: dict[str, dict[str, str]] = {
    "models/linear.py": {"unset_parameter": UNCOUNTED},
    "pipelines/pretrain/optim/optimizer.py": {
        "_flat_weights": "weights",
        "_flat_gradients": "gradients",
        "backward": "activations",
        "*": "optimizer step",
    },
    "pipelines/pretrain/optim/unit.py": {
        "_unset": "masters and moments",
        "_zeros": "gradients",
        "refresh": "weights",
        "gather": "gathered weights",
        "_start": "reduction",
        "*": "weights",
    },
    "pipelines/pretrain/optim/partitioned.py": {"backward": "activations", "*": "optimizer step"},
    "pipelines/pretrain/optim/adamw.py": {"prepare": "masters and moments", "step": "optimizer step"},
    "models/fp8.py": {"get": "quantized weights", "hold": "quantized weights"},
    "kernels/fp8_linear.py": {"transposed": "quantized weights"},
    "kernels/util/deferred.py": {"gradient_of": "gradients"},
    "models/expert_parallel/all_to_all.py": {"*": "communication"},
    "models/expert_parallel/exchange.py": {"*": "communication"},
    "models/expert_parallel/exchange_check.py": {"*": "communication"},
    "models/expert_parallel/count_exchange.py": {"*": "communication"},
    "models/expert_parallel/routes.py": {"*": "communication"},
    "models/expert_parallel/two_hop.py": {"*": "communication"},
    "models/expert_parallel/send_plan.py": {"*": "communication"},
    "kernels/cross_entropy.py": {"*": "head"},
    "models/whole_layer.py": {"_to_host": "offloaded activations"},
    "pipelines/pretrain/optim/ema.py": {"*": "moving average"},
    "pipelines/pretrain/checkpoint/host_copy.py": {"*": "checkpoint copy"},
    "pipelines/pretrain/train_step.py": {"micro_batches": "batch", "on_device": "batch"},
}
OTHER = "activations"
Answer = Callable[[Tensor], Tensor]  # the tensor that the host reads -> what it finds


@dataclass
class Place:
    """Memory in one place, the device or the host, in bytes. now: by part. peak: the largest sum, `at_peak` by part.
    largest: each part's own largest."""

    now: Counter[str] = field(default_factory=Counter)
    total: int = 0
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)

    def add(self, part: str, size: int) -> None:
        self.now[part] += size
        self.total += size
        self.largest[part] = max(self.largest.get(part, 0), self.now[part])
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.now)

    def remove(self, part: str, size: int) -> None:
        self.now[part] -= size
        self.total -= size


@dataclass(frozen=True)
class HostRead:
    """A place where the host waits for the device, or may: file:function, and what it does there."""

    where: str
    what: str


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that measures. answers: by "file:function", what a read of the host there finds."""

    def __init__(self, answers: Mapping[str, Answer] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.host = Place(), Place()
        self.reads: Counter[HostRead] = Counter()
        self._answers = answers or {}
        self._followed: dict[int, weakref.ref[Any]] = {}
        self._on_host: set[int] = set()

    def host_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A meta tensor that stands for one on the host."""
        with torch.utils._python_dispatch._disable_current_modes():
            tensor = torch.empty(shape, dtype=dtype, device="meta")
        self._on_host.add(tensor.untyped_storage()._cdata)
        # PyTorch's allocator of pinned memory rounds up to powers of two.
        self._follow(tensor, self.host, 1 << (tensor.untyped_storage().nbytes() - 1).bit_length())
        return tensor

    def note(self, what: str) -> None:
        """Records that the host waits here."""
        self.reads[HostRead(_caller(), what)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.note("reads a number")
            return 1
        if func is torch.ops.aten._to_copy.default and _to_host(args[0], kwargs):
            return self._read(args[0], kwargs.get("dtype"))
        if func is torch.ops.aten._to_copy.default and _to_device(args[0], kwargs):
            self.note("copies a tensor to the device")
        if func is torch.ops.aten.copy_.default and args[0].device.type == "cpu" and args[1].is_meta:
            self._read(args[1], args[0].dtype)
            return args[0]
        out = func(*args, **kwargs)
        for tensor in (out,) if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else ():
            if isinstance(tensor, Tensor):
                self._follow(tensor, self.device if tensor.is_meta else self.host)
        return out

    def _read(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        caller = _caller()
        if tensor.untyped_storage()._cdata not in self._on_host:
            self.reads[HostRead(caller, "copies a tensor to the host")] += 1
        if caller in self._answers:
            return self._answers[caller](tensor)
        return torch.ones(tensor.shape, dtype=dtype or tensor.dtype, device="cpu")

    def _follow(self, tensor: Tensor, place: Place, taken: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._followed:
            return
        size, part = taken or -(-storage.nbytes() // _BLOCK) * _BLOCK, _part()
        if part == UNCOUNTED:
            size = 0
        place.add(part, size)

        def freed(_: Any) -> None:
            del self._followed[key]
            self._on_host.discard(key)
            place.remove(part, size)

        self._followed[key] = weakref.ref(storage, freed)


def _to_host(source: Any, kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu" and bool(source.is_meta)


def _to_device(source: Any, kwargs: Mapping[str, Any]) -> bool:
    """A copy that does not wait (`non_blocking`) keeps the host from nothing."""
    device = kwargs.get("device")
    waits = not kwargs.get("non_blocking", False)
    return device is not None and torch.device(device).type == "meta" and source.device.type == "cpu" and waits


def _frames() -> Any:
    """(file below Moray's root, function) of the running functions of Moray, innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_SOURCES) and not name.startswith(_OWN):
            yield name[len(_ROOT) :], frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]


def _caller() -> str:
    file, function = next(_frames(), ("", ""))
    return f"{file}:{function}"


def _part() -> str:
    for file, function in _frames():
        functions = PARTS.get(file)
        if functions and (part := functions.get(function) or functions.get("*")):
            return part
    return OTHER
