"""GEMMs of FP8 matrices with block scales: plain, grouped over rows, grouped over the summed axis.

Both factors have the summed axis last, as Hopper's FP8 tensor cores require. A has a scale per 1 x 128 tile of its
rows. B has a scale per block of 128 x 128 (weights), or per 1 x 128 tile like A (activations, in a weight's gradient):

    forward          y [M, N]  = x [M, K]       w [N, K]       tiles, blocks
    input gradient   dx [M, K] = dy [M, N]      w^T [K, N]     tiles, blocks
    weight gradient  dw [N, K] = dy^T [N, M]    x^T [K, M]     tiles, tiles

Grouped over rows, expert e multiplies rows [offsets_e, offsets_e+1) of A by its own B. Grouped over the summed axis, it
sums over those rows. Offsets are multiples of 128 and stay on the device. The number of CTAs follows from the buffer
sizes, and a CTA without rows returns at once.

Notable: tensor cores keep about 14 bits of an FP8 sum, so an error of 2 % accumulates over K = 4096 (DeepSeek-V3
§3.3.2). Here the partial sum of every 128 elements is multiplied by its scales and added in FP32. The block scales
require this multiplication anyway. Tiles are loaded into shared memory by tensor descriptors (TMA), which fill
out-of-bounds elements with zeros. Rows whose bytes are not a multiple of 16 are padded first.

Shapes: M, N rows of A and B, K summed elements, J = ceil(K / 128), E groups, R rows of a grouped buffer.
"""

import itertools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moray.kernels.quantize import BLOCK, ROW_TILES, WEIGHT_BLOCKS, dequantize
from moray.kernels.tuning import Tiles, tiles
from moray.kernels.util.arguments import FP8_DTYPES, check_tensor
from moray.kernels.util.backend import backend, contiguous_blocks, row_offset

OUT_DTYPES = (torch.float32, torch.bfloat16)


def fp8_gemm_reference(
    a_MK: Tensor, a_scales: Tensor, b_NK: Tensor, b_scales: Tensor, *, b_block: tuple[int, int] = WEIGHT_BLOCKS,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """A B^T of the dequantized factors in FP32, rounded to `dtype`: [M, N]."""
    return (dequantize(a_MK, a_scales, ROW_TILES) @ dequantize(b_NK, b_scales, b_block).t()).to(dtype)


def fp8_gemm_grouped_reference(
    a_RK: Tensor, a_scales: Tensor, b_ENK: Tensor, b_scales: Tensor, offsets_E1: Tensor, *,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Rows [offsets_e, offsets_e+1) of A times B_e^T: [R, N]. Rows from the last offset on are zeros."""
    out_RN = a_RK.new_zeros((a_RK.shape[0], b_ENK.shape[1]), dtype=dtype)
    edges = offsets_E1.tolist()
    for expert, (begin, end) in enumerate(itertools.pairwise(edges)):
        part = slice(begin, end)
        out_RN[part] = fp8_gemm_reference(a_RK[part], a_scales[part], b_ENK[expert], b_scales[expert], dtype=dtype)
    return out_RN


def fp8_gemm_k_grouped_reference(
    a_MR: Tensor, a_scales: Tensor, b_NR: Tensor, b_scales: Tensor, offsets_E1: Tensor
) -> Tensor:
    """Sums over columns [offsets_e, offsets_e+1) of A B^T: [E, M, N] FP32; zeros for an empty group."""
    a32, b32 = dequantize(a_MR, a_scales, ROW_TILES), dequantize(b_NR, b_scales, ROW_TILES)
    edges = offsets_E1.tolist()
    sums = [a32[:, x:y] @ b32[:, x:y].t() for x, y in itertools.pairwise(edges)]
    return torch.stack(sums)


@triton.jit
def _tile_of(program, rows, columns, GROUP: tl.constexpr):
    """Returns the (row, column) of a CTA's tile. GROUP rows of tiles are visited column by column, so that their shared
    parts of A and B stay in the L2 cache."""
    walk = GROUP * columns
    first = (program // walk) * GROUP
    height = min(rows - first, GROUP)
    inside = program % walk
    return first + inside % height, inside // height


@triton.jit
def _gemm(
    a_desc, b_desc, a_scale_ptr, b_scale_ptr, out_ptr, offsets_ptr, M, N, J, groups,
    B_ROWS: tl.constexpr, GROUPED: tl.constexpr, GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Computes one tile of BM x BN. B_ROWS is 128 for weights (BN divides it), 1 for tiles."""
    row, column = _tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), 8)
    m, n = row * BM, column * BN
    expert = 0
    if GROUPED:
        ids = tl.arange(0, GROUPS)
        ends = tl.load(offsets_ptr + 1 + ids, mask=ids < groups, other=2147483647)
        expert = tl.sum((ends <= m).to(tl.int32))
        if expert >= groups:
            return
    rows, columns = m + tl.arange(0, BM), n + tl.arange(0, BN)
    a_scales = a_scale_ptr + row_offset(rows, J)
    if B_ROWS == 1:
        b_scales = b_scale_ptr + row_offset(columns, J)
    else:
        b_scales = b_scale_ptr + row_offset(expert * tl.cdiv(N, B_ROWS) + n // B_ROWS, J)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for j in range(0, J):
        a = a_desc.load([m, j * 128])
        b = b_desc.load([expert * N + n, j * 128])
        by_row = tl.load(a_scales + j, mask=rows < M, other=0.0)
        if B_ROWS == 1:
            by_column = tl.load(b_scales + j, mask=columns < N, other=0.0)
            total += tl.dot(a, b.T) * by_row[:, None] * by_column[None, :]
        else:
            total += tl.dot(a, b.T) * (by_row * tl.load(b_scales + j))[:, None]
    at = row_offset(rows[:, None], N) + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gemm_k_grouped(
    a_desc, b_desc, a_scale_ptr, b_scale_ptr, out_ptr, offsets_ptr, M, N, J,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Computes one tile of one group's sum."""
    row, column = _tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), 8)
    expert = tl.program_id(1)
    m, n = row * BM, column * BN
    rows, columns = m + tl.arange(0, BM), n + tl.arange(0, BN)
    a_scales, b_scales = a_scale_ptr + row_offset(rows, J), b_scale_ptr + row_offset(columns, J)
    begin, end = tl.load(offsets_ptr + expert) // 128, tl.load(offsets_ptr + expert + 1) // 128
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for j in range(begin, end):
        a = a_desc.load([m, j * 128])
        b = b_desc.load([n, j * 128])
        by_row = tl.load(a_scales + j, mask=rows < M, other=0.0)
        by_column = tl.load(b_scales + j, mask=columns < N, other=0.0)
        total += tl.dot(a, b.T) * by_row[:, None] * by_column[None, :]
    at = row_offset(row_offset(expert, M) + rows[:, None], N) + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(out_ptr + at, total, mask=inside)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Tensor descriptor for blocks of rows x 128 of a matrix. A stack counts as one matrix. Pads rows to multiples of
    16 bytes."""
    flat = x.flatten(0, -2)
    if flat.shape[-1] % 16:
        flat = F.pad(flat.view(torch.uint8), (0, -flat.shape[-1] % 16)).view(x.dtype)
    # Explicit strides: torch considers a single row contiguous whatever its stride is.
    return TensorDescriptor(flat, flat.shape, (flat.shape[-1], 1), [rows, BLOCK])


def _check_factor(name: str, x: Tensor, scales: Tensor, block: tuple[int, int], like: Tensor) -> None:
    check_tensor(name, x, (None,) * x.dim(), FP8_DTYPES, like=like)
    rows, columns = x.shape[-2:]
    expected = (*x.shape[:-2], contiguous_blocks(rows, block[0]), contiguous_blocks(columns, BLOCK))
    check_tensor(f"{name}'s scales", scales, expected, (torch.float32,), like=like)


def _check_offsets(offsets_E1: Tensor, groups: int, like: Tensor) -> None:
    check_tensor("offsets_E1", offsets_E1, (groups + 1,), (torch.int32,), like=like)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in OUT_DTYPES:
        raise ValueError(f"dtype = {dtype}, expected {' or '.join(map(str, OUT_DTYPES))}")


def fp8_gemm_triton(
    a_MK: Tensor, a_scales: Tensor, b_NK: Tensor, b_scales: Tensor, *, b_block: tuple[int, int] = WEIGHT_BLOCKS,
    dtype: torch.dtype = torch.bfloat16, shape: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """`fp8_gemm_reference` on tensor cores. `shape` is for tuning."""
    if b_block not in (WEIGHT_BLOCKS, ROW_TILES):
        raise ValueError(f"b_block = {b_block}, expected {WEIGHT_BLOCKS} or {ROW_TILES}")
    _check_dtype(dtype)
    m, k = a_MK.shape
    n = b_NK.shape[0]
    check_tensor("b_NK", b_NK, (n, k), FP8_DTYPES, like=a_MK)
    _check_factor("a_MK", a_MK, a_scales, ROW_TILES, a_MK)
    _check_factor("b_NK", b_NK, b_scales, b_block, a_MK)
    if not m * n * k:
        return a_MK.new_zeros((m, n), dtype=dtype)
    out_MN = torch.empty((m, n), dtype=dtype, device=a_MK.device)
    shape = shape or tiles("fp8_gemm", a_MK.device, m, n, k)
    grid = (triton.cdiv(m, shape.rows) * triton.cdiv(n, shape.columns),)
    _gemm[grid](
        _descriptor(a_MK, shape.rows), _descriptor(b_NK, shape.columns), a_scales, b_scales, out_MN, a_scales,
        m, n, a_scales.shape[1], 1, B_ROWS=b_block[0], GROUPED=False, GROUPS=1, BM=shape.rows, BN=shape.columns,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return out_MN


def fp8_gemm_grouped_triton(
    a_RK: Tensor, a_scales: Tensor, b_ENK: Tensor, b_scales: Tensor, offsets_E1: Tensor, *,
    dtype: torch.dtype = torch.bfloat16, shape: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """`fp8_gemm_grouped_reference` on tensor cores; rows from the last offset on are not written."""
    _check_dtype(dtype)
    r, k = a_RK.shape
    experts, n, _ = b_ENK.shape
    check_tensor("b_ENK", b_ENK, (experts, n, k), FP8_DTYPES, like=a_RK)
    _check_factor("a_RK", a_RK, a_scales, ROW_TILES, a_RK)
    _check_factor("b_ENK", b_ENK, b_scales, WEIGHT_BLOCKS, a_RK)
    _check_offsets(offsets_E1, experts, a_RK)
    if not r * n * k:
        return a_RK.new_zeros((r, n), dtype=dtype)
    out_RN = torch.empty((r, n), dtype=dtype, device=a_RK.device)
    shape = shape or tiles("fp8_gemm_grouped", a_RK.device, r, n, k)
    grid = (triton.cdiv(r, shape.rows) * triton.cdiv(n, shape.columns),)
    _gemm[grid](
        _descriptor(a_RK, shape.rows), _descriptor(b_ENK, shape.columns), a_scales, b_scales, out_RN, offsets_E1,
        r, n, a_scales.shape[1], experts, B_ROWS=BLOCK, GROUPED=True, GROUPS=triton.next_power_of_2(experts),
        BM=shape.rows, BN=shape.columns, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return out_RN


def fp8_gemm_k_grouped_triton(
    a_MR: Tensor, a_scales: Tensor, b_NR: Tensor, b_scales: Tensor, offsets_E1: Tensor, *, shape: Tiles | None = None
) -> Tensor:
    """`fp8_gemm_k_grouped_reference` on tensor cores."""
    m, r = a_MR.shape
    n, experts = b_NR.shape[0], offsets_E1.shape[0] - 1
    check_tensor("b_NR", b_NR, (n, r), FP8_DTYPES, like=a_MR)
    _check_factor("a_MR", a_MR, a_scales, ROW_TILES, a_MR)
    _check_factor("b_NR", b_NR, b_scales, ROW_TILES, a_MR)
    _check_offsets(offsets_E1, experts, a_MR)
    if not m * n * r:
        return a_MR.new_zeros((experts, m, n), dtype=torch.float32)
    out_EMN = torch.empty((experts, m, n), dtype=torch.float32, device=a_MR.device)
    shape = shape or tiles("fp8_gemm_k_grouped", a_MR.device, m, n, r)
    grid = (triton.cdiv(m, shape.rows) * triton.cdiv(n, shape.columns), experts)
    _gemm_k_grouped[grid](
        _descriptor(a_MR, shape.rows), _descriptor(b_NR, shape.columns), a_scales, b_scales, out_EMN, offsets_E1,
        m, n, a_scales.shape[1], BM=shape.rows, BN=shape.columns, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return out_EMN


def fp8_gemm(
    a_MK: Tensor, a_scales: Tensor, b_NK: Tensor, b_scales: Tensor, *, b_block: tuple[int, int] = WEIGHT_BLOCKS,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """A B^T in `dtype` (FP32 or BF16): [M, N]. A is quantized in tiles of 1 x 128, B in blocks of `b_block`."""
    implementation = fp8_gemm_triton if backend(a_MK) == "triton" else fp8_gemm_reference
    return implementation(a_MK, a_scales, b_NK, b_scales, b_block=b_block, dtype=dtype)


def fp8_gemm_grouped(
    a_RK: Tensor, a_scales: Tensor, b_ENK: Tensor, b_scales: Tensor, offsets_E1: Tensor, *,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Rows [offsets_e, offsets_e+1) of A times B_e^T, in `dtype`: [R, N]. Rows from the last offset on are undefined.
    Offsets: int32, multiples of 128, ascending from 0 to at most R."""
    implementation = fp8_gemm_grouped_triton if backend(a_RK) == "triton" else fp8_gemm_grouped_reference
    return implementation(a_RK, a_scales, b_ENK, b_scales, offsets_E1, dtype=dtype)


def fp8_gemm_k_grouped(a_MR: Tensor, a_scales: Tensor, b_NR: Tensor, b_scales: Tensor, offsets_E1: Tensor) -> Tensor:
    """Sums over columns [offsets_e, offsets_e+1) of A B^T: [E, M, N] FP32. Offsets as in `fp8_gemm_grouped`."""
    implementation = fp8_gemm_k_grouped_triton if backend(a_MR) == "triton" else fp8_gemm_k_grouped_reference
    return implementation(a_MR, a_scales, b_NR, b_scales, offsets_E1)
