"""Selects a kernel's backend: the PyTorch reference on the CPU, Triton elsewhere.

Every kernel file defines `NAME_reference`, `NAME_triton` and `NAME`, which calls `backend()`. With
`MORAY_KERNELS=reference` a GPU runs the references, to tell a wrong kernel from a wrong model. With
`MORAY_KERNELS=triton` a CPU runs Triton's interpreter, which requires that `TRITON_INTERPRET=1` is set before triton is
imported.

Notable: all conversions to FP8 use `to_e4m3`. GPUs round to nearest, ties to even. Triton's interpreter (3.6, 3.7)
halves numbers that round up to the next power of two (31 becomes 16) and converts NaN to 384, so under the interpreter
the bits are computed explicitly.
"""

import os
from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

BACKENDS = ("reference", "triton")
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def backend(tensor: Tensor) -> Literal["reference", "triton"]:
    """The backend for a tensor's device. Raises ValueError if MORAY_KERNELS requests an impossible one."""
    wanted = os.environ.get("MORAY_KERNELS") or ("reference" if tensor.device.type == "cpu" else "triton")
    if wanted not in BACKENDS:
        raise ValueError(f"MORAY_KERNELS={wanted}: expected one of {', '.join(BACKENDS)}")
    if wanted == "reference":
        return "reference"
    if tensor.device.type == "cpu" and not INTERPRETED.value:
        raise ValueError(f"MORAY_KERNELS=triton on device {tensor.device}: set TRITON_INTERPRET=1 as well, or unset it")
    return "triton"


@triton.jit
def row_offset(index, stride):
    """index * stride in 64 bits, because tensors of more than 2^31 elements are common here."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def to_e4m3(x):
    """Converts FP32 numbers within +-448, or NaN, to float8e4nv; to nearest, ties to even."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        # Rounds to three bits of mantissa by adding half a unit; the exponent's bias changes from 127 to 7.
        normal = (((bits & 0x7FFFFFFF) + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Adding 2^14 rounds a number below 2^-6 to a multiple of 2^-9, the smallest step.
        denormal = (((magnitude + 16384.0) - 16384.0) * 512.0).to(tl.int32)
        nearest = tl.where(x != x, 0x7F, tl.where(magnitude < 0.015625, denormal, normal))
        return (nearest | ((bits >> 24) & 0x80)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Converts FP32 numbers to DTYPE; to nearest, ties to even. (The interpreter of Triton 3.6 and 3.7 truncates to
    BF16.)"""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def magnitude_bits(x):
    """The bits of |x| in FP32. They have the same order as the numbers, with infinity and then NaN above all of them.
    So a maximum over bits loses no NaN (a maximum over floats does, on a GPU)."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


def contiguous_blocks(count: int, block: int) -> int:
    """The number of blocks that cover `count` elements."""
    return -(-count // block)
