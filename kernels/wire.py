"""Rows in FP8 as bytes, for the way between ranks: D bytes of E4M3, then one byte for each scale.

A tile of 128 columns has a power of two as its scale, whose FP32 exponent is all there is to send: 1.008 bytes a number
instead of 2. No process group need know float8, which gloo does not carry.

Notable: with such scales, quantising the unpacked row again gives back its numbers, in rows and, as long as a column's
numbers are within 2^13 of each other, in columns; so what the experts compute does not depend on whether a row came
from another rank. An exponent of 255 stands for NaN, the scale of a tile that is not finite.

Shapes: T rows, D columns, J = ceil(D / 128) scales, W = D + J bytes.
"""

import torch
from torch import Tensor

from moray.kernels.quantize import dequantize, quantize
from moray.kernels.rows_cpu import compiles, pack_rows_compiled

_MANTISSA_BITS = 23


def packed_width(columns: int) -> int:
    """Bytes of a packed row."""
    return columns + -(-columns // 128)


def pack_rows_reference(x_TD: Tensor) -> Tensor:
    """In PyTorch."""
    fp8_TD, scales_TJ = quantize(x_TD, power_of_two=True)
    exponents_TJ = (scales_TJ.view(torch.int32) >> _MANTISSA_BITS) & 0xFF
    return torch.cat((fp8_TD.view(torch.uint8), exponents_TJ.to(torch.uint8)), dim=1)


def pack_rows(x_TD: Tensor) -> Tensor:
    """uint8 [T, W] of FP32 or BF16 rows."""
    return pack_rows_compiled(x_TD) if compiles(x_TD) else pack_rows_reference(x_TD)


def unpack_rows(bytes_TW: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """What `pack_rows` made, as numbers of `dtype`: [T, columns]. Raises ValueError where the widths do not fit."""
    if bytes_TW.shape[1] != packed_width(columns):
        raise ValueError(f"bytes_TW has {bytes_TW.shape[1]} columns, rows of {columns} take {packed_width(columns)}")
    fp8_TD = bytes_TW[:, :columns].view(torch.float8_e4m3fn)
    # 255 becomes an infinity, and all of such a tile's numbers are NaN.
    scales_TJ = (bytes_TW[:, columns:].int() << _MANTISSA_BITS).view(torch.float32)
    return dequantize(fp8_TD, scales_TJ, dtype=dtype)
