"""The compiled forward over the latent cache on CPUs (`cached_step.c`): its build, and its structs for ctypes.

The library is built at the first use by the C compiler and kept in a folder, under the hash of sources, flags, compiler
and processor. The functions do not check their arguments: `models/compiled.py` fills the structs and runs them.

Shapes: N outputs, K inputs of a matrix, P panels of 32 outputs.
"""

import ctypes
import functools
import hashlib
import math
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 32
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2}
GROUP = 16  # positions whose latents are interleaved in the cache
_HERE = Path(__file__).parent
_SOURCES = (_HERE / "cached_step.c", *sorted((_HERE / "native").glob("*.h")))
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=gnu11", "-shared", "-fPIC", "-pthread")
_LIBRARIES = ("-lm",)
_COMPILE_SECONDS = 300
_CHUNK = 1 << 26


class BuildError(RuntimeError):
    """The library cannot be built on this machine."""


def _all(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names.split())


class CMatrix(Structure):
    _fields_ = (*_all(c_void_p, "panels scales"), *_all(c_int32, "outputs inputs format"))


class CLayer(Structure):
    _fields_ = (
        *_all(CMatrix, "q_a q_b kv_a key value o gate up down router e_gate e_up e_down"),
        *_all(c_void_p, "attention_norm mlp_norm q_norm kv_norm bias"),
        ("moe", c_int32),
    )


class CRouter(Structure):
    _fields_ = (*_all(c_int32, "experts top_k groups top_groups normalize"), ("scale", c_float))


class CModel(Structure):
    _fields_ = (
        *_all(c_int32, "hidden layers heads nope rope value latent q_rank inner expert_inner vocab embedding_format"),
        *_all(c_float, "score_scale eps latent_eps"),
        ("router", CRouter),
        *_all(c_void_p, "embedding rotary final_norm"),
        ("head", CMatrix),
        ("layer", POINTER(CLayer)),
    )


class CBatch(Structure):
    _fields_ = (
        *_all(c_int32, "rows wanted_rows slots tokens"),
        *_all(c_void_p, "ids positions table tables wanted cache"),
        ("layer_stride", c_int64),
        *_all(c_void_p, "logits hidden best load"),
    )


def library(folder: Path) -> ctypes.CDLL:
    """The library, from `folder` if it is there, else built. Raises BuildError with the reason."""
    return _load(folder.absolute())


@functools.cache
def _load(folder: Path) -> ctypes.CDLL:
    compiler = _compiler()
    path = folder / f"cached_step-{_identity(compiler)}.so"
    try:
        loaded = _built(compiler, path)
    except OSError as error:  # of the folder, or of a library that does not fit this machine
        raise BuildError(f"{path} cannot be made or loaded: {error}") from error
    for name, result, arguments in (
        ("cached_step_floats", c_int64, (POINTER(CModel), c_int64, c_int32)),
        ("cached_step_start", c_void_p, (c_int32,)),
        ("cached_step_end", None, (c_void_p,)),
        ("cached_step", None, (c_void_p, POINTER(CModel), POINTER(CBatch), c_void_p)),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def _built(compiler: str, path: Path) -> ctypes.CDLL:
    """The library, compiled if it is not there or cannot be loaded. Raises BuildError, OSError."""
    if path.is_file():
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged
            path.unlink()
    _build(compiler, path)
    return ctypes.CDLL(str(path))


def _compiler() -> str:
    """The path of `$CC`, `cc`, `gcc` or `clang`."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("there is no C compiler: neither $CC nor cc, gcc or clang is a program")


def _identity(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [source.read_text() for source in _SOURCES]
    return hashlib.sha256("\0".join([*sources, *_FLAGS, compiler, version, _processor()]).encode()).hexdigest()[:16]


def _processor() -> str:
    """The processor's model and instruction sets, which `-march=native` compiles for."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.machine() + platform.processor()
    first = info.read_text().split("\n\n")[0].splitlines()
    return "\n".join(
        line for line in first if line.split("\t")[0] in ("vendor_id", "model", "model name", "flags", "Features")
    )


def _build(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        made = Path(folder) / path.name
        command = [compiler, *_FLAGS, str(_SOURCES[0]), "-o", str(made), *_LIBRARIES]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler} took more than {_COMPILE_SECONDS} s for {_SOURCES[0].name}") from error
        if done.returncode or not made.is_file():
            raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        made.replace(path)


class HugePages:
    """Memory for tensors that are kept together, in pages of 2 MiB where the system has them: with pages of 4 KiB, a
    core reads large weights at 0.6 times the rate."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)
        self._used = 1

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy, aligned to 64 bytes."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros, aligned to 64 bytes, that take memory when they are written."""
        begin, count = -(-self._used // 64) * 64, math.prod(shape)
        if begin + count * dtype.itemsize > len(self._memory):
            begin, size = 0, max(_CHUNK, count * dtype.itemsize)
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._used = begin + count * dtype.itemsize
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=begin).view(*shape)


def padded(size: int) -> int:
    """Rounds up to whole panels."""
    return -(-size // PANEL) * PANEL


def pack(weight_NK: Tensor, form: str) -> tuple[Tensor, Tensor | None]:
    """A matrix as panels [P, K, 32] of `form`, one of `FORMATS`, and the scales of its outputs, [32 P], for INT8.

    INT8 numbers are x / scale rounded to the nearest, with an output's largest magnitude at 127.
    """
    outputs, inputs = weight_NK.shape
    wide = F.pad(weight_NK.float(), (0, 0, 0, padded(outputs) - outputs))
    scales = None
    if form == "int8":
        scales = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        wide = (wide / scales.unsqueeze(1)).round()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[form]
    return wide.view(-1, PANEL, inputs).transpose(1, 2).to(
        dtype, memory_format=torch.contiguous_format
    ).contiguous(), scales
