"""SwiGLU fused with quantization: silu(gate) * up [* the router's weight], forward and backward.

The forward reads gate and up once and writes three FP8 tensors: their product, for the down projection, and gate and
up, which is all that the backward saves (DeepSeek-V3 §3.2.2: SwiGLU's inputs are saved in FP8, its output is
recomputed). The backward reads these and the product's gradient once from memory and writes the inputs of the next
three GEMMs: the gradient of gate and up in tiles along the rows (for dx) and, transposed, along the tokens (for dw),
and the product itself, transposed (for the down projection's dw).

Gate and up are adjacent, because one GEMM with both weights computes them: gate in columns [0, F), up in [F, 2F). F is
a multiple of 128, so no tile contains both. Bytes per row and element of F, in BF16: forward 4 read and 3 written,
backward 4 read and 5 written; unfused it is 11 and 21.

Notable: all scales are powers of two, so a tile's FP8 numbers do not depend on the direction in which it is quantized,
except for numbers below the smallest normal one. A GPU's sigmoid differs from PyTorch's in the last bits, so a number
near the boundary between two FP8 numbers may be rounded to the other one.

Shapes: R rows, a multiple of 128 (groups of experts' rows, each padded to that), F inner elements, J = F / 128, I = R /
128.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.quantize import BLOCK, ROW_TILES, dequantize_reference, quantize_reference, scaled_e4m3, tile_scales
from moray.kernels.util.arguments import FLOAT_DTYPES, FP8_DTYPES, check_tensor
from moray.kernels.util.backend import backend, magnitude_bits, row_offset

Quantized = tuple[Tensor, Tensor]  # FP8 numbers and their scales, in tiles of 1 x 128


class SwiGLUGradients(NamedTuple):
    """rowwise [R, 2F]: the gradient of gate and up. transposed [2F, R]: its transpose. inner [F, R]: the product,
    transposed.

    weights_R: the gradient of the router's weights, FP32, or None.
    """

    rowwise: Quantized
    transposed: Quantized
    inner: Quantized
    weights_R: Tensor | None


def swiglu_quantize_reference(gate_up_RH: Tensor, weights_R: Tensor | None = None) -> tuple[Quantized, Quantized]:
    """Returns (the product [R, F], gate and up [R, 2F]), each quantized. H = 2F."""
    gate_RF, up_RF = gate_up_RH.float().chunk(2, dim=1)
    inner_RF = gate_RF * gate_RF.sigmoid() * up_RF
    if weights_R is not None:
        inner_RF = inner_RF * weights_R.float().unsqueeze(1)
    return quantize_reference(inner_RF, ROW_TILES, True), quantize_reference(gate_up_RH, ROW_TILES, True)


def swiglu_backward_reference(
    gate_up: Quantized, d_inner_RF: Tensor, weights_R: Tensor | None = None
) -> SwiGLUGradients:
    """The gradients for the saved gate and up, given the unquantized gradient of the product."""
    gate_RF, up_RF = dequantize_reference(*gate_up, ROW_TILES).chunk(2, dim=1)
    sigmoid_RF, d_RF = gate_RF.sigmoid(), d_inner_RF.float()
    silu_RF = gate_RF * sigmoid_RF
    inner_RF, d_weights_R = silu_RF * up_RF, None
    if weights_R is not None:
        d_weights_R = (d_RF * inner_RF).sum(1)
        d_RF, inner_RF = d_RF * weights_R.float().unsqueeze(1), inner_RF * weights_R.float().unsqueeze(1)
    d_gate_RF = d_RF * up_RF * sigmoid_RF * (1 + gate_RF * (1 - sigmoid_RF))
    both_RH = torch.cat((d_gate_RF, d_RF * silu_RF), dim=1)
    return SwiGLUGradients(
        quantize_reference(both_RH, ROW_TILES, True),
        quantize_reference(both_RH.t(), ROW_TILES, True),
        quantize_reference(inner_RF.t(), ROW_TILES, True),
        d_weights_R,
    )


@triton.jit
def _store_rowwise(x, fp8_ptr, scale_ptr, rows, columns, tile, R, width):
    """Stores x as tiles of 1 x 128 of a matrix [R, width]; `tile` is the index of the tile within a row."""
    scales = tile_scales(tl.max(magnitude_bits(x), axis=1, keep_dims=True), True)
    inside = rows[:, None] < R
    tl.store(fp8_ptr + row_offset(rows[:, None], width) + columns[None, :], scaled_e4m3(x, scales, True), mask=inside)
    tl.store(scale_ptr + row_offset(rows[:, None], width // 128) + tile, scales, mask=inside)


@triton.jit
def _store_transposed(x, fp8_ptr, scale_ptr, rows, columns, tile, R):
    """Stores x transposed, as tiles of 1 x 128 of a matrix [columns, R]."""
    scales = tile_scales(tl.max(magnitude_bits(x), axis=0, keep_dims=True), True)
    tl.store(fp8_ptr + row_offset(columns[:, None], R) + rows[None, :], tl.trans(scaled_e4m3(x, scales, True)))
    tl.store(scale_ptr + row_offset(columns[None, :], R // 128) + tile, scales)


@triton.jit
def _forward(
    gate_up_ptr, weight_ptr, inner_ptr, inner_scale_ptr, held_ptr, held_scale_ptr, R, F, WEIGHTED: tl.constexpr
):
    """Processes 32 rows of one tile of 128 columns."""
    rows, tile = tl.program_id(1) * 32 + tl.arange(0, 32), tl.program_id(0)
    columns = tile * 128 + tl.arange(0, 128)
    inside = rows[:, None] < R
    at = gate_up_ptr + row_offset(rows[:, None], 2 * F) + columns[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    inner = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        inner *= tl.load(weight_ptr + rows, mask=rows < R, other=0.0)[:, None]
    _store_rowwise(inner, inner_ptr, inner_scale_ptr, rows, columns, tile, R, F)
    _store_rowwise(gate, held_ptr, held_scale_ptr, rows, columns, tile, R, 2 * F)
    _store_rowwise(up, held_ptr, held_scale_ptr, rows, columns + F, tile + F // 128, R, 2 * F)


@triton.jit
def _gradients(held_ptr, held_scale_ptr, d_inner_ptr, weight_ptr, rows, columns, tile, F, WEIGHTED: tl.constexpr):
    """Returns (product, gradient of gate, of up, d_inner * the unweighted product) at some rows and columns of one
    tile."""
    at = row_offset(rows[:, None], 2 * F) + columns[None, :]
    scale_at = held_scale_ptr + row_offset(rows[:, None], 2 * F // 128) + tile
    gate = tl.load(held_ptr + at).to(tl.float32) * tl.load(scale_at)
    up = tl.load(held_ptr + at + F).to(tl.float32) * tl.load(scale_at + F // 128)
    d = tl.load(d_inner_ptr + row_offset(rows[:, None], F) + columns[None, :]).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    inner = silu * up
    d_weight = d * inner
    if WEIGHTED:
        weight = tl.load(weight_ptr + rows)[:, None]
        d *= weight
        inner *= weight
    return inner, d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * silu, d_weight


@triton.jit
def _backward(
    held_ptr, held_scale_ptr, d_inner_ptr, weight_ptr,
    rowwise_ptr, rowwise_scale_ptr, transposed_ptr, transposed_scale_ptr, inner_ptr, inner_scale_ptr, d_weight_ptr,
    R, F, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Does an eighth of the work on one part of 128 x 128: 32 of its columns, for the tiles along the tokens, or 32 of
    its rows, for the tiles along the rows. The eight CTAs run concurrently, so the second read is served by the L2
    cache."""
    block, tile, eighth = tl.program_id(1), tl.program_id(0) // 8, tl.program_id(0) % 8
    if eighth < 4:
        _transposed_gradients(
            held_ptr, held_scale_ptr, d_inner_ptr, weight_ptr,
            transposed_ptr, transposed_scale_ptr, inner_ptr, inner_scale_ptr, block, tile, eighth, R, F, WEIGHTED,
        )  # fmt: skip
    else:
        _rowwise_gradients(
            held_ptr, held_scale_ptr, d_inner_ptr, weight_ptr, rowwise_ptr, rowwise_scale_ptr, d_weight_ptr,
            block * 128 + (eighth - 4) * 32, tile, R, F, WEIGHTED,
        )  # fmt: skip


@triton.jit
def _transposed_gradients(
    held_ptr, held_scale_ptr, d_inner_ptr, weight_ptr,
    transposed_ptr, transposed_scale_ptr, inner_ptr, inner_scale_ptr,
    block, tile, quarter, R, F, WEIGHTED: tl.constexpr,
):  # fmt: skip
    rows, columns = block * 128 + tl.arange(0, 128), tile * 128 + quarter * 32 + tl.arange(0, 32)
    inner, d_gate, d_up, _ = _gradients(
        held_ptr, held_scale_ptr, d_inner_ptr, weight_ptr, rows, columns, tile, F, WEIGHTED
    )
    _store_transposed(inner, inner_ptr, inner_scale_ptr, rows, columns, block, R)
    _store_transposed(d_gate, transposed_ptr, transposed_scale_ptr, rows, columns, block, R)
    _store_transposed(d_up, transposed_ptr, transposed_scale_ptr, rows, columns + F, block, R)


@triton.jit
def _rowwise_gradients(
    held_ptr, held_scale_ptr, d_inner_ptr, weight_ptr, rowwise_ptr, rowwise_scale_ptr, d_weight_ptr, first, tile, R, F,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    rows, columns = first + tl.arange(0, 32), tile * 128 + tl.arange(0, 128)
    _, d_gate, d_up, d_weight = _gradients(
        held_ptr, held_scale_ptr, d_inner_ptr, weight_ptr, rows, columns, tile, F, WEIGHTED
    )
    _store_rowwise(d_gate, rowwise_ptr, rowwise_scale_ptr, rows, columns, tile, R, 2 * F)
    _store_rowwise(d_up, rowwise_ptr, rowwise_scale_ptr, rows, columns + F, tile + F // 128, R, 2 * F)
    if WEIGHTED:
        tl.store(d_weight_ptr + row_offset(rows, F // 128) + tile, tl.sum(d_weight, axis=1))


def _empty_fp8(rows: int, columns: int, like: Tensor) -> Quantized:
    fp8 = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=like.device)
    return fp8, torch.empty((rows, columns // BLOCK), dtype=torch.float32, device=like.device)


def _sizes(name: str, gate_up: Tensor, dtypes: tuple[torch.dtype, ...], weights_R: Tensor | None) -> tuple[int, int]:
    check_tensor(name, gate_up, (None, None), dtypes)
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.shape[1] % (2 * BLOCK):
        raise ValueError(f"{name} has {gate_up.shape[1]} columns, expected a multiple of {2 * BLOCK}: gate, then up")
    if rows % BLOCK:
        raise ValueError(f"{name} has {rows} rows, expected a multiple of {BLOCK}")
    if weights_R is not None:
        check_tensor("weights_R", weights_R, (rows,), (torch.float32,), like=gate_up)
    return rows, inner


def swiglu_quantize_triton(gate_up_RH: Tensor, weights_R: Tensor | None = None) -> tuple[Quantized, Quantized]:
    """`swiglu_quantize_reference` in one pass."""
    rows, inner = _sizes("gate_up_RH", gate_up_RH, FLOAT_DTYPES, weights_R)
    product, held = _empty_fp8(rows, inner, gate_up_RH), _empty_fp8(rows, 2 * inner, gate_up_RH)
    if rows * inner:
        _forward[(inner // BLOCK, triton.cdiv(rows, 32))](
            gate_up_RH, gate_up_RH if weights_R is None else weights_R, *product, *held, rows, inner,
            WEIGHTED=weights_R is not None,
        )  # fmt: skip
    return product, held


def swiglu_backward_triton(gate_up: Quantized, d_inner_RF: Tensor, weights_R: Tensor | None = None) -> SwiGLUGradients:
    """`swiglu_backward_reference` in one pass."""
    rows, inner = _sizes("gate_up", gate_up[0], FP8_DTYPES, weights_R)
    check_tensor("gate_up's scales", gate_up[1], (rows, 2 * inner // BLOCK), (torch.float32,), like=gate_up[0])
    check_tensor("d_inner_RF", d_inner_RF, (rows, inner), FLOAT_DTYPES, like=gate_up[0])
    rowwise, transposed = _empty_fp8(rows, 2 * inner, d_inner_RF), _empty_fp8(2 * inner, rows, d_inner_RF)
    product = _empty_fp8(inner, rows, d_inner_RF)
    parts_RJ = torch.empty((rows, inner // BLOCK), dtype=torch.float32, device=d_inner_RF.device)
    if rows * inner:
        _backward[(8 * (inner // BLOCK), rows // BLOCK)](
            *gate_up, d_inner_RF, d_inner_RF if weights_R is None else weights_R, *rowwise, *transposed,
            *product, parts_RJ, rows, inner, WEIGHTED=weights_R is not None, num_warps=8,
        )  # fmt: skip
    return SwiGLUGradients(rowwise, transposed, product, None if weights_R is None else parts_RJ.sum(1))


def swiglu_quantize(gate_up_RH: Tensor, weights_R: Tensor | None = None) -> tuple[Quantized, Quantized]:
    """Returns (silu(gate) * up [* weights] [R, F], gate and up [R, 2F]), each quantized. H = 2F; F and R are multiples
    of 128."""
    implementation = swiglu_quantize_triton if backend(gate_up_RH) == "triton" else swiglu_quantize_reference
    return implementation(gate_up_RH, weights_R)


def swiglu_backward(gate_up: Quantized, d_inner_RF: Tensor, weights_R: Tensor | None = None) -> SwiGLUGradients:
    """The gradients for the tensors that `swiglu_quantize` saved."""
    implementation = swiglu_backward_triton if backend(d_inner_RF) == "triton" else swiglu_backward_reference
    return implementation(gate_up, d_inner_RF, weights_R)
