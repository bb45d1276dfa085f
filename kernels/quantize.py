"""FP8 E4M3 with a scale per block (DeepSeek-V3 §3.3.2): tiles of 1x128 for activations, blocks of 128x128 for weights.

A block's scale is its largest magnitude divided by 448, the largest E4M3 number, so nothing saturates. value = FP8
number times scale. Scales are FP32, or powers of two rounded up. With powers of two, a tile can be transposed without a
second rounding.

Notable: a block of zeros or of values below 448 * 2^-126 gets the smallest normal FP32 scale, 2^-126. This avoids
divisions by zero and FP32 scales that a device flushes to zero. A block with a NaN or an infinity gets the scale NaN,
so the whole block dequantizes to NaN: the error shows in the first product instead of disappearing in a saturated
number.

The Triton kernels give the reference's bits. `quantize_both` reads memory once. It writes the tiles along the rows and,
transposed, the tiles along the columns, because tensor cores require the summed axis of both factors of a weight's
gradient last.

Shapes: X any leading axes, M rows, K columns, I = ceil(M / block rows), J = ceil(K / block columns).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.util.arguments import FLOAT_DTYPES, check_tensor
from moray.kernels.util.backend import backend, contiguous_blocks, magnitude_bits, rounded, row_offset, to_e4m3

E4M3_MAX = 448.0
_SMALLEST_SCALE = 2.0**-126
BLOCK = 128
ROW_TILES = (1, BLOCK)
COLUMN_TILES = (BLOCK, 1)
WEIGHT_BLOCKS = (BLOCK, BLOCK)
# Numbers per CTA (rows, columns), by block.
_PARTS = {ROW_TILES: (32, BLOCK), COLUMN_TILES: (BLOCK, 64), WEIGHT_BLOCKS: (BLOCK, BLOCK)}


def _blocks(x_XMK: Tensor, block: tuple[int, int]) -> Tensor:
    """FP32 blocks, the last ones padded with zeros: [X, I, rows, J, columns]."""
    rows, columns = x_XMK.shape[-2:]
    padded = x_XMK.float()
    if rows % block[0] or columns % block[1]:
        padded = F.pad(padded, (0, -columns % block[1], 0, -rows % block[0]))
    return torch.unflatten(torch.unflatten(padded, -1, (-1, block[1])), -3, (-1, block[0]))


def fp8_to_bf16(fp8: Tensor) -> Tensor:
    """E4M3 numbers in BF16, which represents all of them. On the CPU this converts bits, five times as fast as torch's
    cast."""
    if fp8.device.type != "cpu":
        return fp8.bfloat16()
    # The sign and seven bits are shifted to BF16's positions; its exponent bias is 127 instead of 7.
    bits = fp8.view(torch.int8).to(torch.int16)
    bf16 = ((bits << 4) & -0x7810).view(torch.bfloat16).mul_(2.0**120)
    return bf16.masked_fill_((bits & 0x7F) == 0x7F, float("nan"))


def _unblock(blocks: Tensor, rows: int, columns: int) -> Tensor:
    return blocks.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]


def block_scales(largest_XIJ: Tensor, power_of_two: bool = False) -> Tensor:
    """Scales of blocks with the given largest magnitudes."""
    scales = (largest_XIJ / E4M3_MAX).clamp(min=_SMALLEST_SCALE)
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    return torch.where(largest_XIJ.isfinite(), scales, float("nan"))


def quantize_reference(
    x_XMK: Tensor, block: tuple[int, int] = ROW_TILES, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns (float8_e4m3fn of the same shape, FP32 scales_XIJ). Rounds to nearest, ties to even."""
    blocks = _blocks(x_XMK, block)
    # Reducing along the contiguous axis first is twice as fast as along both at once.
    scales_XIJ = block_scales(blocks.abs().amax(-1).amax(-2), power_of_two)
    scaled = blocks / scales_XIJ[..., :, None, :, None]
    # The quotient of the largest number and its scale may round to just above 448.
    fp8 = scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return _unblock(fp8, *x_XMK.shape[-2:]).contiguous(), scales_XIJ


def dequantize_reference(
    fp8_XMK: Tensor, scales_XIJ: Tensor, block: tuple[int, int] = (1, BLOCK), dtype: torch.dtype = torch.float32
) -> Tensor:
    """FP8 numbers times their scales, in `dtype`."""
    values = _blocks(fp8_to_bf16(fp8_XMK), block) * scales_XIJ[..., :, None, :, None]
    return _unblock(values, *fp8_XMK.shape[-2:]).to(dtype).contiguous()


def check_scales(fp8_XMK: Tensor, scales_XIJ: Tensor, block: tuple[int, int]) -> None:
    """Raises ValueError if the shape of the scales does not match the FP8 numbers."""
    rows, columns = fp8_XMK.shape[-2:]
    expected = (*fp8_XMK.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if tuple(scales_XIJ.shape) != expected:
        raise ValueError(f"scales have shape {tuple(scales_XIJ.shape)}, blocks of {block} need {expected}")


def quantize_rows_int8(x_XK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (INT8 numbers, FP32 scales_X1). A row's scale is its largest magnitude over 127, or 1 for a row of
    zeros."""
    upcast_XK = x_XK.float()
    largest_X1 = upcast_XK.abs().amax(-1, keepdim=True)
    scales_X1 = torch.where(largest_X1 > 0, largest_X1 / 127.0, 1.0)
    return (upcast_XK / scales_X1).round().to(torch.int8), scales_X1


def quantize_both_reference(
    x_MK: Tensor, power_of_two: bool = False
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Quantizes x and its transpose in tiles of 1 x 128: ((fp8_MK, scales_MJ), (fp8_KM, scales_KI))."""
    return quantize_reference(x_MK, ROW_TILES, power_of_two), quantize_reference(x_MK.t(), ROW_TILES, power_of_two)


@triton.jit
def tile_scales(largest, POWER_OF_TWO: tl.constexpr):
    """Scales of blocks, given the bits of their largest magnitudes; NaN for a block that is not finite."""
    if POWER_OF_TWO:
        # 448 is 1.75 * 2^8. So the scale's exponent is that of the magnitude less 8, and one more if the mantissa is
        # above 1.75, whose bits are 0x600000: adding 0x1FFFFF then carries into the exponent.
        bits = ((largest + 0x1FFFFF) & 0x7F800000) - (8 << 23)
        scales = tl.maximum(bits, 1 << 23).to(tl.float32, bitcast=True)
    else:
        scales = tl.maximum(tl.math.div_rn(largest.to(tl.float32, bitcast=True), 448.0), 1.1754943508222875e-38)
    return tl.where(largest < 0x7F800000, scales, float("nan"))


@triton.jit
def scaled_e4m3(x, scales, POWER_OF_TWO: tl.constexpr):
    """Divides x by its scales and converts it to FP8."""
    if POWER_OF_TWO:
        # The inverse of a power of two is a power of two: exact, and an eighth of a division's instructions. No product
        # exceeds 448. A NaN belongs into the inverse, of which there is one per tile.
        inverse = (0x7F000000 - scales.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        return to_e4m3(x * tl.where(scales == scales, inverse, float("nan")))
    quotient = tl.math.div_rn(x, scales)  # of the largest number: possibly just above 448
    return to_e4m3(tl.where(quotient != quotient, quotient, tl.minimum(tl.maximum(quotient, -448.0), 448.0)))


@triton.jit
def _quantize(
    x_ptr, fp8_ptr, scale_ptr, M, K, block_rows, block_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """Quantizes one part of HEIGHT x WIDTH numbers. The block is ROWS x COLUMNS; ROWS is 1 or HEIGHT, COLUMNS is 1 or
    WIDTH."""
    row, column, stack = tl.program_id(1), tl.program_id(0), tl.program_id(2)
    rows, columns = row * HEIGHT + tl.arange(0, HEIGHT), column * WIDTH + tl.arange(0, WIDTH)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    at = row_offset(row_offset(stack, M) + rows[:, None], K) + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    largest = magnitude_bits(x)
    if COLUMNS > 1:
        largest = tl.max(largest, axis=1, keep_dims=True)
    if ROWS > 1:
        largest = tl.max(largest, axis=0, keep_dims=True)
    scales = tile_scales(largest, POWER_OF_TWO)
    tl.store(fp8_ptr + at, scaled_e4m3(x, scales, POWER_OF_TWO), mask=inside)
    i = row * (HEIGHT // ROWS) + tl.arange(0, HEIGHT // ROWS)
    j = column * (WIDTH // COLUMNS) + tl.arange(0, WIDTH // COLUMNS)
    in_scales = (i[:, None] < block_rows) & (j[None, :] < block_columns)
    at = row_offset(row_offset(stack, block_rows) + i[:, None], block_columns) + j[None, :]
    tl.store(scale_ptr + at, scales, mask=in_scales)


def quantize_triton(
    x_XMK: Tensor, block: tuple[int, int] = ROW_TILES, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """The same bits as `quantize_reference`, for blocks of 1 x 128, 128 x 1 and 128 x 128 of contiguous tensors."""
    if block not in _PARTS:
        raise ValueError(f"block = {block}, expected one of {', '.join(map(str, _PARTS))}")
    check_tensor("x_XMK", x_XMK, (None,) * max(x_XMK.dim(), 2), FLOAT_DTYPES)
    *lead, rows, columns = x_XMK.shape
    i, j = contiguous_blocks(rows, block[0]), contiguous_blocks(columns, block[1])
    fp8 = torch.empty(x_XMK.shape, dtype=torch.float8_e4m3fn, device=x_XMK.device)
    scales = torch.empty((*lead, i, j), dtype=torch.float32, device=x_XMK.device)
    if fp8.numel():
        height, width = _PARTS[block]
        stack = x_XMK.numel() // (rows * columns)
        grid = (triton.cdiv(columns, width), triton.cdiv(rows, height), stack)
        _quantize[grid](
            x_XMK, fp8, scales, rows, columns, i, j,
            ROWS=block[0], COLUMNS=block[1], HEIGHT=height, WIDTH=width, POWER_OF_TWO=power_of_two,
        )  # fmt: skip
    return fp8, scales


@triton.jit
def _quantize_both(
    x_ptr, fp8_ptr, scale_ptr, transposed_ptr, transposed_scale_ptr, M, K, block_rows, block_columns,
    POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """Does an eighth of the work on one part of 128 x 128 numbers: 32 of its columns, or 32 of its rows.

    The eight CTAs run concurrently, so the second read is served by the L2 cache. A CTA that processed a whole part
    would need so many registers that only one fits on an SM, which idles whenever that CTA waits for memory.
    """
    row, column, eighth = tl.program_id(1), tl.program_id(0) // 8, tl.program_id(0) % 8
    if eighth < 4:
        _quantize_transposed(
            x_ptr, transposed_ptr, transposed_scale_ptr, row, column * 128 + eighth * 32, M, K, block_rows, POWER_OF_TWO
        )
    else:
        _quantize_rowwise(
            x_ptr, fp8_ptr, scale_ptr, row * 128 + (eighth - 4) * 32, column, M, K, block_columns, POWER_OF_TWO
        )


@triton.jit
def _quantize_transposed(x_ptr, fp8_ptr, scale_ptr, row, first, M, K, block_rows, POWER_OF_TWO: tl.constexpr):
    """Quantizes 128 rows of 32 columns, transposed."""
    rows, columns = row * 128 + tl.arange(0, 128), first + tl.arange(0, 32)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    x = tl.load(x_ptr + row_offset(rows[:, None], K) + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    scales = tile_scales(tl.max(magnitude_bits(x), axis=0, keep_dims=True), POWER_OF_TWO)
    at = row_offset(columns[:, None], M) + rows[None, :]
    fp8 = tl.trans(scaled_e4m3(x, scales, POWER_OF_TWO))
    tl.store(fp8_ptr + at, fp8, mask=(columns[:, None] < K) & (rows[None, :] < M))
    tl.store(scale_ptr + row_offset(columns[None, :], block_rows) + row, scales, mask=columns[None, :] < K)


@triton.jit
def _quantize_rowwise(x_ptr, fp8_ptr, scale_ptr, first, column, M, K, block_columns, POWER_OF_TWO: tl.constexpr):
    """Quantizes 32 rows of 128 columns."""
    rows, columns = first + tl.arange(0, 32), column * 128 + tl.arange(0, 128)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    at = row_offset(rows[:, None], K) + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scales = tile_scales(tl.max(magnitude_bits(x), axis=1, keep_dims=True), POWER_OF_TWO)
    tl.store(fp8_ptr + at, scaled_e4m3(x, scales, POWER_OF_TWO), mask=inside)
    tl.store(scale_ptr + row_offset(rows[:, None], block_columns) + column, scales, mask=rows[:, None] < M)


def quantize_both_triton(
    x_MK: Tensor, power_of_two: bool = False
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The same bits as `quantize_both_reference`, in one pass."""
    check_tensor("x_MK", x_MK, (None, None), FLOAT_DTYPES)
    rows, columns = x_MK.shape
    i, j = contiguous_blocks(rows, BLOCK), contiguous_blocks(columns, BLOCK)
    fp8 = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x_MK.device)
    scales = torch.empty((rows, j), dtype=torch.float32, device=x_MK.device)
    transposed = torch.empty((columns, rows), dtype=torch.float8_e4m3fn, device=x_MK.device)
    transposed_scales = torch.empty((columns, i), dtype=torch.float32, device=x_MK.device)
    if fp8.numel():
        _quantize_both[(8 * j, i)](x_MK, fp8, scales, transposed, transposed_scales, rows, columns, i, j, power_of_two)
    return (fp8, scales), (transposed, transposed_scales)


def quantize(x_XMK: Tensor, block: tuple[int, int] = ROW_TILES, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Returns (float8_e4m3fn of the same shape, FP32 scales_XIJ). Rounds to nearest, ties to even."""
    if backend(x_XMK) == "triton":
        return quantize_triton(x_XMK.contiguous(), block, power_of_two)
    return quantize_reference(x_XMK, block, power_of_two)


def quantize_both(x_MK: Tensor, power_of_two: bool = False) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Quantizes x and its transpose in tiles of 1 x 128: ((fp8_MK, scales_MJ), (fp8_KM, scales_KI))."""
    if backend(x_MK) == "triton":
        return quantize_both_triton(x_MK.contiguous(), power_of_two)
    return quantize_both_reference(x_MK, power_of_two)


@triton.jit
def _dequantize(
    fp8_ptr, scale_ptr, out_ptr, M, K, stride, block_rows, block_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The inverse of `_quantize`. stride: from one row of FP8 numbers to the next."""
    row, column, stack = tl.program_id(1), tl.program_id(0), tl.program_id(2)
    rows, columns = row * HEIGHT + tl.arange(0, HEIGHT), column * WIDTH + tl.arange(0, WIDTH)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    number = row_offset(stack, M) + rows[:, None]
    x = tl.load(fp8_ptr + row_offset(number, stride) + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    i = row * (HEIGHT // ROWS) + tl.arange(0, HEIGHT // ROWS)
    j = column * (WIDTH // COLUMNS) + tl.arange(0, WIDTH // COLUMNS)
    at = row_offset(row_offset(stack, block_rows) + i[:, None], block_columns) + j[None, :]
    scales = tl.load(scale_ptr + at, mask=(i[:, None] < block_rows) & (j[None, :] < block_columns), other=0.0)
    tl.store(
        out_ptr + row_offset(number, K) + columns[None, :], rounded(x * scales, out_ptr.dtype.element_ty), mask=inside
    )


def dequantize_triton(
    fp8_XMK: Tensor, scales_XIJ: Tensor, block: tuple[int, int] = ROW_TILES, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The same numbers as `dequantize_reference`, in one launch. Rows of a matrix may be apart, as in messages that
    carry more than the numbers."""
    if block not in _PARTS:
        raise ValueError(f"block = {block}, expected one of {', '.join(map(str, _PARTS))}")
    check_scales(fp8_XMK, scales_XIJ, block)
    *lead, rows, columns = fp8_XMK.shape
    if lead or fp8_XMK.stride(-1) != 1:
        fp8_XMK = fp8_XMK.contiguous()
    out_XMK = torch.empty(fp8_XMK.shape, dtype=dtype, device=fp8_XMK.device)
    if out_XMK.numel():
        height, width = _PARTS[block]
        stack = out_XMK.numel() // (rows * columns)
        grid = (triton.cdiv(columns, width), triton.cdiv(rows, height), stack)
        _dequantize[grid](
            fp8_XMK, scales_XIJ.contiguous(), out_XMK, rows, columns, fp8_XMK.stride(-2), *scales_XIJ.shape[-2:],
            ROWS=block[0], COLUMNS=block[1], HEIGHT=height, WIDTH=width,
        )  # fmt: skip
    return out_XMK


def dequantize(
    fp8_XMK: Tensor, scales_XIJ: Tensor, block: tuple[int, int] = ROW_TILES, dtype: torch.dtype = torch.float32
) -> Tensor:
    """FP8 numbers times their scales, in FP32 and then in `dtype`."""
    if backend(fp8_XMK) == "triton" and dtype in FLOAT_DTYPES:
        return dequantize_triton(fp8_XMK, scales_XIJ, block, dtype)
    return dequantize_reference(fp8_XMK, scales_XIJ, block, dtype)
