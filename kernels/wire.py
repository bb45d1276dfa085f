"""The wire format of FP8 rows between ranks: D bytes of E4M3, then one byte per scale.

The scale of a tile of 128 columns is a power of two, so only its FP32 exponent is sent: 1.008 bytes per number instead
of 2. Since rows are sent as bytes, process groups need no float8 support, which gloo lacks.

Notable: with such scales, quantizing the unpacked row again gives the same numbers, along rows and also along columns,
as long as a column's numbers are within 2^13 of each other. So the experts' results do not depend on whether a row came
from another rank. An exponent of 255 encodes NaN, the scale of a tile that is not finite.

Shapes: T rows, D columns, J = ceil(D / 128) scales, W = D + J bytes.
"""

import torch
from torch import Tensor

from moray.kernels.fp8_rows import Fp8Rows
from moray.kernels.quantize import quantize
from moray.kernels.rows_cpu import compiles, pack_rows_compiled

_MANTISSA_BITS = 23


def packed_width(columns: int) -> int:
    """Bytes of a packed row."""
    return columns + -(-columns // 128)


def pack_rows_reference(x_TD: Tensor) -> Tensor:
    """`pack_rows` in PyTorch."""
    fp8_TD, scales_TJ = quantize(x_TD, power_of_two=True)
    exponents_TJ = (scales_TJ.view(torch.int32) >> _MANTISSA_BITS) & 0xFF
    return torch.cat((fp8_TD.view(torch.uint8), exponents_TJ.to(torch.uint8)), dim=1)


def pack_rows(x_TD: Tensor) -> Tensor:
    """Packs FP32 or BF16 rows: uint8 [T, W]."""
    return pack_rows_compiled(x_TD) if compiles(x_TD) else pack_rows_reference(x_TD)


def unpack_rows(bytes_TW: Tensor, columns: int, dtype: torch.dtype) -> Fp8Rows:
    """Rows packed by `pack_rows`, as a tensor [T, columns] of `dtype`; a view of the bytes. Raises ValueError if the
    widths do not match."""
    if bytes_TW.shape[1] != packed_width(columns):
        raise ValueError(f"bytes_TW has {bytes_TW.shape[1]} columns, rows of {columns} take {packed_width(columns)}")
    fp8_TD = bytes_TW[:, :columns].view(torch.float8_e4m3fn)
    # 255 becomes an infinity, so all numbers of the tile are NaN.
    scales_TJ = (bytes_TW[:, columns:].int() << _MANTISSA_BITS).view(torch.float32)
    return Fp8Rows(fp8_TD, scales_TJ, dtype)


def quantize_rows(x_TD: Tensor) -> Fp8Rows:
    """What the receiver of `pack_rows` gets, without packing. Contiguous."""
    if compiles(x_TD):
        return unpack_rows(pack_rows_compiled(x_TD), x_TD.shape[1], x_TD.dtype)
    return Fp8Rows(*quantize(x_TD, power_of_two=True), x_TD.dtype)
