"""Rows in FP8 as they are received: E4M3 numbers with a power-of-two scale per 128 columns.

`Fp8Rows` is a tensor of the dtype in which the model computes. So autograd passes rows, and gradients of rows, from the
dispatcher to the experts without widening them. The experts multiply them as they are. Every other operation
dequantizes them first.

A weight's gradient needs tiles along the other axis. With powers of two, they are made from the rows without a second
rounding of mantissas (`kernels/wire.py`), and only then, so that it is off the forward pass.

Shapes: M rows, K columns, I = ceil(M / 128), J = ceil(K / 128).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.quantize import (
    BLOCK,
    ROW_TILES,
    check_scales,
    dequantize,
    dequantize_reference,
    quantize_reference,
    scaled_e4m3,
    tile_scales,
)
from moray.kernels.util.arguments import FP8_DTYPES, check_tensor
from moray.kernels.util.backend import backend, contiguous_blocks, magnitude_bits, row_offset


class Fp8Rows(Tensor):
    """fp8: float8_e4m3fn [M, K]; rows may be apart. scales: FP32 [M, J], powers of two. A tensor [M, K] of `dtype`."""

    fp8: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, fp8: Tensor, scales: Tensor, dtype: torch.dtype) -> Fp8Rows:
        made: Fp8Rows = Tensor._make_wrapper_subclass(cls, fp8.shape, dtype=dtype, device=fp8.device)
        made.fp8, made.scales = fp8, scales
        return made

    def __init__(self, fp8: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        """Does nothing: `__new__` initialises the object."""

    def dequantized(self) -> Tensor:
        """The numbers in `dtype`, which represents them exactly if it is BF16 or wider."""
        return dequantize(self.fp8, self.scales, dtype=self.dtype)

    def transposed(self) -> tuple[Tensor, Tensor]:
        """`transpose_fp8` of the rows."""
        return transpose_fp8(self.fp8, self.scales)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            (rows,) = args
            return cls(rows.fp8, rows.scales, rows.dtype)
        return func(*map(_plain, args), **{name: _plain(value) for name, value in (kwargs or {}).items()})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Fp8Rows({list(self.shape)}, dtype={self.dtype}, device={self.device})"


def _plain(argument: Any) -> Any:
    if isinstance(argument, Fp8Rows):
        return argument.dequantized()
    if isinstance(argument, Sequence) and not isinstance(argument, str):
        return type(argument)(map(_plain, argument))  # type: ignore[call-arg]
    return argument


def transpose_fp8_reference(fp8_MK: Tensor, scales_MJ: Tensor) -> tuple[Tensor, Tensor]:
    """`transpose_fp8` in PyTorch."""
    return quantize_reference(dequantize_reference(fp8_MK, scales_MJ).t(), ROW_TILES, power_of_two=True)


@triton.jit
def _transpose(x_ptr, scale_ptr, fp8_ptr, transposed_scale_ptr, stride, M, K, block_rows, block_columns):
    """Transposes 128 rows of 32 columns."""
    rows, first = tl.program_id(1) * 128 + tl.arange(0, 128), tl.program_id(0) * 32
    columns = first + tl.arange(0, 32)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    x = tl.load(x_ptr + row_offset(rows[:, None], stride) + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    row_scales = tl.load(scale_ptr + row_offset(rows, block_columns) + first // 128, mask=rows < M, other=0.0)
    x *= row_scales[:, None]
    scales = tile_scales(tl.max(magnitude_bits(x), axis=0, keep_dims=True), True)
    at = row_offset(columns[:, None], M) + rows[None, :]
    fp8 = tl.trans(scaled_e4m3(x, scales, True))
    tl.store(fp8_ptr + at, fp8, mask=(columns[:, None] < K) & (rows[None, :] < M))
    at = row_offset(columns[None, :], block_rows) + tl.program_id(1)
    tl.store(transposed_scale_ptr + at, scales, mask=columns[None, :] < K)


def transpose_fp8_triton(fp8_MK: Tensor, scales_MJ: Tensor) -> tuple[Tensor, Tensor]:
    """The same bits as `transpose_fp8_reference`, in one launch."""
    check_tensor("fp8_MK", fp8_MK, (None, None), FP8_DTYPES, strides=(None, 1))
    check_scales(fp8_MK, scales_MJ, ROW_TILES)
    rows, columns = fp8_MK.shape
    i, j = contiguous_blocks(rows, BLOCK), contiguous_blocks(columns, BLOCK)
    transposed = torch.empty((columns, rows), dtype=fp8_MK.dtype, device=fp8_MK.device)
    scales = torch.empty((columns, i), dtype=torch.float32, device=fp8_MK.device)
    if transposed.numel():
        _transpose[(contiguous_blocks(columns, 32), i)](
            fp8_MK, scales_MJ.contiguous(), transposed, scales, fp8_MK.stride(0), rows, columns, i, j
        )
    return transposed, scales


def transpose_fp8(fp8_MK: Tensor, scales_MJ: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes the transpose in tiles of 1 x 128: (fp8_KM, scales_KI). The scales are powers of two.

    A number more than 2^13 below the largest of its tile may be rounded again. Raises ValueError if the scales do not
    match the numbers.
    """
    if backend(fp8_MK) == "triton":
        return transpose_fp8_triton(fp8_MK, scales_MJ)
    return transpose_fp8_reference(fp8_MK, scales_MJ)
