"""FP8 E4M3 with a scale per block (DeepSeek-V3 §3.3.2): tiles of 1x128 for activations, blocks of 128x128 for weights.

A block's scale is its largest magnitude over 448, the largest E4M3 number, so that nothing saturates; value = FP8
number times scale. Scales are FP32, or powers of two rounded up, with which a tile can change its direction without a
second rounding.

Notable: a block of zeros or of values below 448 * 2^-126 gets the smallest normal FP32 scale, 2^-126: never a division
by zero, never an FP32 scale that a device flushes to zero. A block with a NaN or an infinity gets the scale NaN, so
that all of it reads as NaN: it shows in the first product instead of vanishing in a saturated number.

Shapes: X any leading axes, M rows, K columns, I = ceil(M / block rows), J = ceil(K / block columns).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
_SMALLEST_SCALE = 2.0**-126
BLOCK = 128


def _blocks(x_XMK: Tensor, block: tuple[int, int]) -> Tensor:
    """FP32 blocks, the last ones filled up with zeros: [X, I, rows, J, columns]."""
    rows, columns = x_XMK.shape[-2:]
    padded = x_XMK.float()
    if rows % block[0] or columns % block[1]:
        padded = F.pad(padded, (0, -columns % block[1], 0, -rows % block[0]))
    return torch.unflatten(torch.unflatten(padded, -1, (-1, block[1])), -3, (-1, block[0]))


def _unblock(blocks: Tensor, rows: int, columns: int) -> Tensor:
    return blocks.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]


def block_scales(largest_XIJ: Tensor, power_of_two: bool = False) -> Tensor:
    """The scales of blocks whose largest magnitudes are given."""
    scales = (largest_XIJ / E4M3_MAX).clamp(min=_SMALLEST_SCALE)
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    return torch.where(largest_XIJ.isfinite(), scales, float("nan"))


def quantize_reference(
    x_XMK: Tensor, block: tuple[int, int] = (1, BLOCK), power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns (float8_e4m3fn of the same shape, FP32 scales_XIJ). Rounds to nearest, ties to even."""
    blocks = _blocks(x_XMK, block)
    # Along the contiguous axis first, which is twice as fast as along both at once.
    scales_XIJ = block_scales(blocks.abs().amax(-1).amax(-2), power_of_two)
    scaled = blocks / scales_XIJ[..., :, None, :, None]
    # The quotient of the largest by its scale may round to just above 448.
    fp8 = scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return _unblock(fp8, *x_XMK.shape[-2:]).contiguous(), scales_XIJ


def dequantize_reference(
    fp8_XMK: Tensor, scales_XIJ: Tensor, block: tuple[int, int] = (1, BLOCK), dtype: torch.dtype = torch.float32
) -> Tensor:
    """FP8 numbers times their scales, in `dtype`."""
    wide = _blocks(fp8_XMK, block) * scales_XIJ[..., :, None, :, None]
    return _unblock(wide, *fp8_XMK.shape[-2:]).to(dtype).contiguous()


def check_scales(fp8_XMK: Tensor, scales_XIJ: Tensor, block: tuple[int, int]) -> None:
    """Raises ValueError where scales do not fit the FP8 numbers."""
    rows, columns = fp8_XMK.shape[-2:]
    expected = (*fp8_XMK.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if tuple(scales_XIJ.shape) != expected:
        raise ValueError(f"scales have shape {tuple(scales_XIJ.shape)}, blocks of {block} need {expected}")


def quantize_rows_int8(x_XK: Tensor) -> tuple[Tensor, Tensor]:
    """(INT8 numbers, FP32 scales_X1): a row's scale is its largest magnitude over 127. A row of zeros has scale 1."""
    wide = x_XK.float()
    largest_X1 = wide.abs().amax(-1, keepdim=True)
    scales_X1 = torch.where(largest_X1 > 0, largest_X1 / 127.0, 1.0)
    return (wide / scales_X1).round().to(torch.int8), scales_X1


quantize = quantize_reference
dequantize = dequantize_reference
