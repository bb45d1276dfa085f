"""Sorts (token, slot) pairs by expert and permutes hidden states into that order.

A `PaddedOrder` starts every expert at a multiple of `tile` rows, in a buffer whose size the host knows in advance. So a
grouped GEMM of FP8 tiles is launched without waiting for the router.

Notable: rows and orders are written without atomics. The backward of a gather by a permutation is the gather by its
inverse, so gradients are bit-identical from run to run, also on a GPU, where a scatter-add is not. Both sorts are
stable: an expert's rows keep the order of the tokens, whatever the other experts receive.

The Triton sort is a counting sort: a histogram per block of pairs, and its prefix sum over blocks. A pair's position is
its expert's start, plus the expert's pairs in earlier blocks, plus the expert's earlier pairs in its own block. The
last term comes from comparing the block's pairs with each other, so its cost does not depend on the number of experts.

Shapes: T tokens, K slots, R rows: T * K pairs (pair t * K + k is slot k of token t) or the padded buffer's capacity, E
experts, D row width, J scales per row.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.util.arguments import FLOAT_DTYPES, FP8_DTYPES, check_tensor
from moray.kernels.util.backend import backend, contiguous_blocks, row_offset

TILE = 128
# Pairs per CTA of the sort.
_PAIRS = 256
_MOST_ROWS = 2**31 - 1


@dataclass(frozen=True)
class PaddedOrder:
    """Positions of pairs in a buffer in which each expert's rows start at a multiple of `tile`. Tensors are int32.

    positions_TK: the row of slot k of token t; -1 if its expert is not local. offsets_E1: the start of each expert's
    rows, followed by the end of the padded rows. counts_E: rows without padding. Expert e's rows are offsets[e] up to
    offsets[e] + counts[e]; its padding extends to offsets[e + 1].
    """

    positions_TK: Tensor
    offsets_E1: Tensor
    counts_E: Tensor
    tile: int = TILE


def padded_capacity(pairs: int, experts: int, tile: int = TILE) -> int:
    """The maximum number of rows of `pairs` pairs over `experts` experts, a multiple of `tile`. The bound is tight.

    In the worst case each of n = min(experts, pairs) experts has at least one pair, and the remaining pairs fill whole
    tiles: n + floor((pairs - n) / tile) tiles. Pairs of non-local experts only reduce it.
    """
    begun = min(experts, pairs)
    return (begun + (pairs - begun) // tile) * tile


def _check_ids(expert_ids_TK: Tensor, num_experts: int, tile: int) -> None:
    check_tensor("expert_ids_TK", expert_ids_TK, (None, None), (torch.int64, torch.int32))
    for name, number in (("num_experts", num_experts), ("tile", tile)):
        if number < 1:
            raise ValueError(f"{name} = {number}, expected at least 1")
    rows = padded_capacity(expert_ids_TK.numel(), num_experts, tile)
    if rows > _MOST_ROWS:
        raise ValueError(f"expert_ids_TK may take {rows} padded rows, expected at most {_MOST_ROWS} (int32 positions)")


def padded_order_reference(expert_ids_TK: Tensor, num_experts: int, tile: int = TILE) -> PaddedOrder:
    """`padded_order` in PyTorch, without synchronizing with a device."""
    _check_ids(expert_ids_TK, num_experts, tile)
    ids_R = expert_ids_TK.flatten().long()
    local_R = (ids_R >= 0) & (ids_R < num_experts)
    # Pairs of non-local experts are sorted after the last expert.
    sorted_R, order_R = torch.where(local_R, ids_R, num_experts).sort(stable=True)
    edges_E1 = torch.searchsorted(sorted_R, torch.arange(num_experts + 1, device=ids_R.device))
    counts_E = edges_E1.diff()
    offsets_E1 = torch.zeros_like(edges_E1)
    offsets_E1[1:] = ((counts_E + tile - 1) // tile * tile).cumsum(0)
    padded_R = (offsets_E1 - edges_E1)[sorted_R] + torch.arange(len(ids_R), device=ids_R.device)
    positions_R = torch.where(local_R, torch.empty_like(padded_R).index_copy_(0, order_R, padded_R), -1)
    return PaddedOrder(positions_R.view(expert_ids_TK.shape).int(), offsets_E1.int(), counts_E.int(), tile)


@triton.jit
def _count_blocks(ids_ptr, block_counts_ptr, P, E, PAIRS: tl.constexpr, BINS: tl.constexpr):
    """Computes a histogram of one block of pairs."""
    block = tl.program_id(0)
    pair, bins = block * PAIRS + tl.arange(0, PAIRS), tl.arange(0, BINS)
    ids = tl.load(ids_ptr + pair, mask=pair < P, other=-1)
    local = (ids >= 0) & (ids < E)
    counts = tl.histogram(tl.where(local, ids, 0).to(tl.int32), BINS, mask=local)
    tl.store(block_counts_ptr + row_offset(block, E) + bins, counts, mask=bins < E)


@triton.jit
def _sum_blocks(block_counts_ptr, counts_ptr, blocks, E, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Replaces the counts of some experts in each block by their sums over all earlier blocks, and stores the
    totals."""
    experts = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, blocks, HEIGHT):
        rows = first + tl.arange(0, HEIGHT)
        inside = (rows[:, None] < blocks) & (experts[None, :] < E)
        at = block_counts_ptr + row_offset(rows[:, None], E) + experts[None, :]
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(counts_ptr + experts, total, mask=experts < E)


@triton.jit
def _place_pairs(
    ids_ptr, before_ptr, counts_ptr, offsets_ptr, positions_ptr, P, E,
    TILE: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Computes the positions of one block of pairs. The first block also writes the offsets."""
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + bins, mask=bins < E, other=0)
    padded = (counts + TILE - 1) // TILE * TILE
    ends = tl.cumsum(padded, axis=0)
    if block == 0:
        tl.store(offsets_ptr, 0)
        tl.store(offsets_ptr + 1 + bins, ends, mask=bins < E)
    lane = tl.arange(0, PAIRS)
    pair = block * PAIRS + lane
    ids = tl.load(ids_ptr + pair, mask=pair < P, other=-1)
    earlier = tl.zeros((PAIRS, STEP), tl.int32)
    for first in range(0, PAIRS, STEP):
        other = first + tl.arange(0, STEP)
        others = tl.load(ids_ptr + block * PAIRS + other, mask=block * PAIRS + other < P, other=-1)
        earlier += ((ids[:, None] == others[None, :]) & (other[None, :] < lane[:, None])).to(tl.int32)
    rank = tl.sum(earlier, axis=1)
    local = (ids >= 0) & (ids < E)
    expert = tl.where(local, ids, 0).to(tl.int32)
    start = tl.gather(ends - padded, expert, axis=0)
    before = tl.load(before_ptr + row_offset(block, E) + expert, mask=local, other=0)
    tl.store(positions_ptr + pair, tl.where(local, start + before + rank, -1), mask=pair < P)


def padded_order_triton(expert_ids_TK: Tensor, num_experts: int, tile: int = TILE) -> PaddedOrder:
    """`padded_order` in three launches."""
    _check_ids(expert_ids_TK, num_experts, tile)
    device, pairs = expert_ids_TK.device, expert_ids_TK.numel()
    blocks = contiguous_blocks(pairs, _PAIRS)
    bins = max(32, triton.next_power_of_2(num_experts))
    positions_TK = torch.empty(expert_ids_TK.shape, dtype=torch.int32, device=device)
    offsets_E1 = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    counts_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    block_counts = torch.empty((blocks, num_experts), dtype=torch.int32, device=device)
    if blocks:
        _count_blocks[(blocks,)](expert_ids_TK, block_counts, pairs, num_experts, PAIRS=_PAIRS, BINS=bins)
    program_width = 16
    _sum_blocks[(contiguous_blocks(num_experts, program_width),)](
        block_counts, counts_E, blocks, num_experts, HEIGHT=64, WIDTH=program_width
    )
    _place_pairs[(max(blocks, 1),)](
        expert_ids_TK, block_counts, counts_E, offsets_E1, positions_TK, pairs, num_experts,
        TILE=tile, PAIRS=_PAIRS, STEP=16, BINS=bins, num_warps=8,
    )  # fmt: skip
    return PaddedOrder(positions_TK, offsets_E1, counts_E, tile)


def padded_order(expert_ids_TK: Tensor, num_experts: int, tile: int = TILE) -> PaddedOrder:
    """Sorts (token, slot) pairs stably by expert, with each expert starting at a multiple of `tile`.

    expert_ids_TK: int64 or int32. An id outside of 0 .. num_experts - 1 (by convention -1) belongs to no local expert.
    Nothing waits for the device, because `padded_capacity` gives the buffer size without the ids. Raises ValueError for
    ids of another shape or dtype, and if positions might exceed int32.
    """
    if backend(expert_ids_TK) == "triton":
        return padded_order_triton(expert_ids_TK.contiguous(), num_experts, tile)
    return padded_order_reference(expert_ids_TK.contiguous(), num_experts, tile)


def check_permutation(order: PaddedOrder, like: Tensor, tokens: int, capacity: int) -> None:
    """Raises ValueError if an order does not match the number of tokens, or a buffer of `capacity` rows."""
    check_tensor("positions_TK", order.positions_TK, (tokens, None), (torch.int32,), like=like)
    check_tensor("counts_E", order.counts_E, (None,), (torch.int32,), like=like)
    experts = len(order.counts_E)
    check_tensor("offsets_E1", order.offsets_E1, (experts + 1,), (torch.int32,), like=like)
    least = padded_capacity(order.positions_TK.numel(), experts, order.tile)
    if capacity < least:
        raise ValueError(f"capacity = {capacity} rows, expected at least {least} (padded_capacity)")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums over rows of `dtype`: FP32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def permute_padded_reference(x_TD: Tensor, order: PaddedOrder, capacity: int, fill: float = 0.0) -> Tensor:
    """`permute_padded` in PyTorch, differentiable, for any dtype. Rows that belong to no pair are set to `fill`."""
    check_permutation(order, x_TD, len(x_TD), capacity)
    # Pairs of non-local experts are written to one additional row, which is then removed.
    places_R = torch.where(order.positions_TK < 0, capacity, order.positions_TK).flatten().long()
    upcast_TD = x_TD.to(accumulation_dtype(x_TD.dtype)) if x_TD.is_floating_point() else x_TD
    expanded_RD = upcast_TD.unsqueeze(1).expand(-1, order.positions_TK.shape[1], -1).flatten(0, 1)
    rows_RD = expanded_RD.new_full((capacity + 1, x_TD.shape[1]), fill).index_copy(0, places_R, expanded_RD)
    return rows_RD[:capacity].to(x_TD.dtype)


@triton.jit
def fill_padding(rows_ptr, offsets_ptr, counts_ptr, expert, columns, D, FILL: tl.constexpr, HEIGHT: tl.constexpr):
    """Fills some columns of the padding after an expert's rows."""
    end = tl.load(offsets_ptr + expert + 1)
    for first in range(tl.load(offsets_ptr + expert) + tl.load(counts_ptr + expert), end, HEIGHT):
        rows = (first + tl.arange(0, HEIGHT)).to(tl.int64)
        inside = (rows[:, None] < end) & (columns[None, :] < D)
        tl.store(rows_ptr + rows[:, None] * D + columns[None, :], FILL, mask=inside)


@triton.jit
def _permute_columns(
    x_ptr, rows_ptr, positions_ptr, offsets_ptr, counts_ptr, columns, D, E,
    K: tl.constexpr, FILL: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Writes some columns of one expert's padding, or of one token's rows."""
    program = tl.program_id(0)
    if program < E:
        fill_padding(rows_ptr, offsets_ptr, counts_ptr, program, columns, D, FILL, HEIGHT)
    else:
        token = program - E
        x = tl.load(x_ptr + row_offset(token, D) + columns, mask=columns < D)
        positions_ptr += row_offset(token, K)
        for k in tl.static_range(K):
            position = tl.load(positions_ptr + k).to(tl.int64)
            tl.store(rows_ptr + position * D + columns, x, mask=(columns < D) & (position >= 0))


@triton.jit
def _permute(
    x_ptr, scales_ptr, rows_ptr, row_scales_ptr, positions_ptr, offsets_ptr, counts_ptr, D, J, E,
    K: tl.constexpr, WIDTH: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Writes the experts' padding, which takes longest and so starts first, then the tokens. The last part of a row is
    its scales."""
    first = tl.program_id(1) * WIDTH
    if first < D:
        _permute_columns(
            x_ptr, rows_ptr, positions_ptr, offsets_ptr, counts_ptr, first + tl.arange(0, WIDTH), D, E, K, 0, 4
        )
    elif SCALES > 0:
        _permute_columns(
            scales_ptr, row_scales_ptr, positions_ptr, offsets_ptr, counts_ptr, tl.arange(0, SCALES), J, E, K, 1, 4
        )


def _permute_triton(x_TD: Tensor, scales_TJ: Tensor | None, order: PaddedOrder, capacity: int) -> tuple[Tensor, Tensor]:
    """Returns rows and their scales, if there are any."""
    tokens, width = x_TD.shape
    check_permutation(order, x_TD, tokens, capacity)
    program_width = row_width(width)
    parts, scales = contiguous_blocks(width, program_width), 0
    rows_RD = torch.empty((capacity, width), dtype=x_TD.dtype, device=x_TD.device)
    row_scales_RJ = x_TD.new_empty((capacity, 0), dtype=torch.float32)
    if scales_TJ is not None:
        scales = scales_TJ.shape[1]
        row_scales_RJ = scales_TJ.new_empty((capacity, scales))
    if rows_RD.numel():
        experts, slots = len(order.counts_E), order.positions_TK.shape[1]
        _permute[(experts + tokens, parts + (scales > 0))](
            x_TD, scales_TJ if scales else row_scales_RJ, rows_RD, row_scales_RJ,
            order.positions_TK, order.offsets_E1, order.counts_E, width, scales, experts,
            K=slots, WIDTH=program_width, SCALES=triton.next_power_of_2(scales) if scales else 0,
        )  # fmt: skip
    return rows_RD, row_scales_RJ


def row_width(columns: int) -> int:
    """The number of columns per CTA."""
    return min(max(triton.next_power_of_2(columns), 16), 2048)


@triton.jit
def _sum_slots(
    rows_ptr, weights_ptr, positions_ptr, out_ptr, D, K: tl.constexpr, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr
):
    """Sums some columns of one token over its slots, in order."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    slots = row_offset(token, K)
    for k in tl.static_range(K):
        position = tl.load(positions_ptr + slots + k).to(tl.int64)
        local = position >= 0
        row = tl.load(rows_ptr + position * D + columns, mask=(columns < D) & local, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights_ptr + slots + k, mask=local, other=0.0)
        total += row
    tl.store(out_ptr + row_offset(token, D) + columns, total, mask=columns < D)


def sum_slots_triton(rows_RD: Tensor, weights_TK: Tensor | None, positions_TK: Tensor) -> Tensor:
    """out[t]: the FP32 sum over k of (weights[t, k] times) rows[positions[t, k]], in the rows' dtype. A position of -1
    adds nothing."""
    tokens, slots = positions_TK.shape
    width = rows_RD.shape[1]
    out_TD = torch.empty((tokens, width), dtype=rows_RD.dtype, device=rows_RD.device)
    if out_TD.numel():
        program_width = row_width(width)
        _sum_slots[(tokens, contiguous_blocks(width, program_width))](
            rows_RD, positions_TK if weights_TK is None else weights_TK, positions_TK, out_TD, width,
            K=slots, WIDTH=program_width, WEIGHTED=weights_TK is not None,
        )  # fmt: skip
    return out_TD


def sum_slots_reference(rows_RD: Tensor, positions_TK: Tensor) -> Tensor:
    """`sum_slots` in PyTorch, for FP32, BF16 or float64."""
    local_TK = positions_TK >= 0
    counts_T = local_TK.sum(1)
    return F.embedding_bag(positions_TK[local_TK], rows_RD, counts_T.cumsum(0) - counts_T, mode="sum")


def sum_slots(rows_RD: Tensor, positions_TK: Tensor) -> Tensor:
    """out[t]: the sum over slots k of rows[positions[t, k]], in order and in high precision, rounded to the rows'
    dtype.

    A position (an integer) of -1 adds nothing. Not differentiable.
    """
    if backend(rows_RD) == "triton" and rows_RD.dtype != torch.float64:
        return sum_slots_triton(rows_RD.contiguous(), None, positions_TK.contiguous())
    return sum_slots_reference(rows_RD, positions_TK)


class _PermutePadded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: PaddedOrder, capacity: int) -> Tensor:
        ctx.save_for_backward(order.positions_TK)
        return _permute_triton(x_TD, None, order, capacity)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (positions_TK,) = ctx.saved_tensors
        return sum_slots_triton(grads[0].contiguous(), None, positions_TK), None, None


def permute_padded_triton(x_TD: Tensor, order: PaddedOrder, capacity: int) -> Tensor:
    """`permute_padded` in one launch. Contiguous FP32, BF16 or FP16."""
    check_tensor("x_TD", x_TD, (None, None), FLOAT_DTYPES)
    rows_RD: Tensor = _PermutePadded.apply(x_TD, order, capacity)  # type: ignore[no-untyped-call]
    return rows_RD


def permute_padded(x_TD: Tensor, order: PaddedOrder, capacity: int) -> Tensor:
    """Copies each token to its positions in a buffer of `capacity` rows: rows_RD, in the dtype of x.

    The padding between experts is zeros. On a GPU, rows from offsets_E1[-1] on are not written, and neither is their
    gradient; they must not be read. The gradient of a token is the sum over its slots, in FP32 and in order. Raises
    ValueError if shapes, dtypes or devices do not match, or if `capacity` may be too small.
    """
    if backend(x_TD) == "triton" and x_TD.dtype != torch.float64:
        return permute_padded_triton(x_TD.contiguous(), order, capacity)
    return permute_padded_reference(x_TD, order, capacity)


def _check_fp8(fp8_TD: Tensor, scales_TJ: Tensor) -> None:
    check_tensor("fp8_TD", fp8_TD, (None, None), FP8_DTYPES)
    check_tensor("scales_TJ", scales_TJ, (len(fp8_TD), None), (torch.float32,), like=fp8_TD)


def permute_padded_fp8_reference(
    fp8_TD: Tensor, scales_TJ: Tensor, order: PaddedOrder, capacity: int
) -> tuple[Tensor, Tensor]:
    """`permute_padded_fp8` in PyTorch."""
    _check_fp8(fp8_TD, scales_TJ)
    rows_RD = permute_padded_reference(fp8_TD.view(torch.uint8), order, capacity)
    return rows_RD.view(fp8_TD.dtype), permute_padded_reference(scales_TJ, order, capacity, fill=1.0)


def permute_padded_fp8_triton(
    fp8_TD: Tensor, scales_TJ: Tensor, order: PaddedOrder, capacity: int
) -> tuple[Tensor, Tensor]:
    """`permute_padded_fp8` in one launch."""
    _check_fp8(fp8_TD, scales_TJ)
    rows_RD, row_scales_RJ = _permute_triton(fp8_TD.view(torch.uint8), scales_TJ, order, capacity)
    return rows_RD.view(fp8_TD.dtype), row_scales_RJ


def permute_padded_fp8(fp8_TD: Tensor, scales_TJ: Tensor, order: PaddedOrder, capacity: int) -> tuple[Tensor, Tensor]:
    """`permute_padded` for float8_e4m3fn rows and their FP32 scales, not differentiable: (rows_RD, scales_RJ).

    Padding rows are zeros with scale 1, so their products are zeros.
    """
    if backend(fp8_TD) == "triton":
        return permute_padded_fp8_triton(fp8_TD.contiguous(), scales_TJ.contiguous(), order, capacity)
    return permute_padded_fp8_reference(fp8_TD, scales_TJ, order, capacity)
