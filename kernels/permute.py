"""Sorts (token, slot) pairs by expert, copies FP8 rows into that order, and sums results over the slots.

A `PaddedOrder` starts every expert at a multiple of `tile` rows, in a buffer whose size the host knows in advance. So a
grouped GEMM of FP8 tiles is launched without waiting for the router.

Notable: rows and orders are written without atomics, and sums are FP32 in the order of the slots, so they are
bit-identical from run to run, also on a GPU, where a scatter-add is not. Both sorts are stable: an expert's rows keep
the order of the tokens, whatever the other experts receive.

The Triton sort is a counting sort: a histogram per block of pairs, and its prefix sum over blocks. A pair's position is
its expert's start, plus the expert's pairs in earlier blocks, plus the expert's earlier pairs in its own block. The
last term comes from comparing the block's pairs with each other, so its cost does not depend on the number of experts.

Shapes: T tokens, K slots, R rows: the padded buffer's capacity, E experts, D row width, J scales per row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.util.arguments import FP8_DTYPES, check_tensor
from moray.kernels.util.backend import backend, contiguous_blocks, rounded, row_offset

TILE = 128
# Pairs per CTA of the sort.
_PAIRS = 256
_MOST_ROWS = 2**31 - 1


@dataclass(frozen=True)
class PaddedOrder:
    """Positions of pairs in a buffer in which each expert's rows start at a multiple of `tile`. Tensors are int32.

    positions_TK: the row of slot k of token t; -1 if its expert is not local. offsets_E1: the start of each expert's
    rows, followed by the end of the padded rows. counts_E: rows without padding. Expert e's rows are offsets[e] up to
    offsets[e] + counts[e]; its padding extends to offsets[e + 1]. capacity: rows of the buffer, at least offsets[E].
    """

    positions_TK: Tensor
    offsets_E1: Tensor
    counts_E: Tensor
    capacity: int


def padded_capacity(pairs: int, experts: int, tile: int = TILE) -> int:
    """The maximum number of rows of `pairs` pairs over `experts` experts, a multiple of `tile`. The bound is tight.

    In the worst case each of n = min(experts, pairs) experts has at least one pair, and the remaining pairs fill whole
    tiles: n + floor((pairs - n) / tile) tiles. Pairs of non-local experts only reduce it.
    """
    begun = min(experts, pairs)
    return (begun + (pairs - begun) // tile) * tile


def _checked_capacity(expert_ids_TK: Tensor, num_experts: int, tile: int, local: int | None) -> int:
    """The capacity, after checks of the arguments."""
    check_tensor("expert_ids_TK", expert_ids_TK, (None, None), (torch.int64, torch.int32))
    for name, number in (("num_experts", num_experts), ("tile", tile)):
        if number < 1:
            raise ValueError(f"{name} = {number}, expected at least 1")
    pairs = expert_ids_TK.numel()
    if local is not None and not 0 <= local <= pairs:
        raise ValueError(f"local = {local} pairs, expected 0 to {pairs}, the pairs of expert_ids_TK")
    rows = padded_capacity(pairs if local is None else local, num_experts, tile)
    if rows > _MOST_ROWS:
        raise ValueError(f"expert_ids_TK may take {rows} padded rows, expected at most {_MOST_ROWS} (int32 positions)")
    return rows


def padded_order_reference(
    expert_ids_TK: Tensor, num_experts: int, tile: int = TILE, local: int | None = None
) -> PaddedOrder:
    """`padded_order` in PyTorch, without synchronizing with a device."""
    capacity = _checked_capacity(expert_ids_TK, num_experts, tile, local)
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
    return PaddedOrder(positions_R.view(expert_ids_TK.shape).int(), offsets_E1.int(), counts_E.int(), capacity)


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


def padded_order_triton(
    expert_ids_TK: Tensor, num_experts: int, tile: int = TILE, local: int | None = None
) -> PaddedOrder:
    """`padded_order` in three launches."""
    capacity = _checked_capacity(expert_ids_TK, num_experts, tile, local)
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
    return PaddedOrder(positions_TK, offsets_E1, counts_E, capacity)


def padded_order(expert_ids_TK: Tensor, num_experts: int, tile: int = TILE, local: int | None = None) -> PaddedOrder:
    """Sorts (token, slot) pairs stably by expert, with each expert starting at a multiple of `tile`.

    expert_ids_TK: int64 or int32. An id outside of 0 .. num_experts - 1 (by convention -1) belongs to no local expert.
    local: the number of pairs of local experts, if the host knows it; it makes the buffer smaller. Nothing waits for
    the device, because `padded_capacity` gives the buffer's size without the ids. Raises ValueError for ids of another
    shape or dtype, and if positions might exceed int32.
    """
    if backend(expert_ids_TK) == "triton":
        return padded_order_triton(expert_ids_TK.contiguous(), num_experts, tile, local)
    return padded_order_reference(expert_ids_TK.contiguous(), num_experts, tile, local)


@triton.jit
def _fill_padding(rows_ptr, offsets_ptr, counts_ptr, expert, columns, D, FILL: tl.constexpr, HEIGHT: tl.constexpr):
    """Fills some columns of the padding after an expert's rows."""
    end = tl.load(offsets_ptr + expert + 1)
    for first in range(tl.load(offsets_ptr + expert) + tl.load(counts_ptr + expert), end, HEIGHT):
        rows = (first + tl.arange(0, HEIGHT)).to(tl.int64)
        inside = (rows[:, None] < end) & (columns[None, :] < D)
        tl.store(rows_ptr + rows[:, None] * D + columns[None, :], FILL, mask=inside)


@triton.jit
def _permute_columns(
    x_ptr, rows_ptr, positions_ptr, offsets_ptr, counts_ptr, columns, stride, D, E,
    K: tl.constexpr, FILL: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Writes some columns of one expert's padding, or of one token's rows. stride: from one token to the next."""
    program = tl.program_id(0)
    if program < E:
        _fill_padding(rows_ptr, offsets_ptr, counts_ptr, program, columns, D, FILL, HEIGHT)
    else:
        token = program - E
        x = tl.load(x_ptr + row_offset(token, stride) + columns, mask=columns < D)
        positions_ptr += row_offset(token, K)
        for k in tl.static_range(K):
            position = tl.load(positions_ptr + k).to(tl.int64)
            tl.store(rows_ptr + position * D + columns, x, mask=(columns < D) & (position >= 0))


@triton.jit
def _permute(
    x_ptr, scales_ptr, rows_ptr, row_scales_ptr, positions_ptr, offsets_ptr, counts_ptr, stride, D, J, E,
    K: tl.constexpr, WIDTH: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Writes the experts' padding, which takes longest and so starts first, then the tokens. The last part of a row is
    its scales."""
    first = tl.program_id(1) * WIDTH
    if first < D:
        _permute_columns(
            x_ptr, rows_ptr, positions_ptr, offsets_ptr, counts_ptr, first + tl.arange(0, WIDTH), stride, D, E, K, 0, 4
        )
    else:
        _permute_columns(
            scales_ptr, row_scales_ptr, positions_ptr, offsets_ptr, counts_ptr, tl.arange(0, SCALES), J, J, E, K, 1, 4
        )


def row_width(columns: int) -> int:
    """The number of columns per CTA."""
    return min(max(triton.next_power_of_2(columns), 16), 2048)


@triton.jit
def _sum_slots(rows_ptr, positions_ptr, out_ptr, D, K: tl.constexpr, WIDTH: tl.constexpr):
    """Sums some columns of one token over its slots, in order."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    slots = row_offset(token, K)
    for k in tl.static_range(K):
        position = tl.load(positions_ptr + slots + k).to(tl.int64)
        inside = (columns < D) & (position >= 0)
        total += tl.load(rows_ptr + position * D + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row_offset(token, D) + columns, rounded(total, out_ptr.dtype.element_ty), mask=columns < D)


def sum_slots_triton(rows_RD: Tensor, positions_TK: Tensor) -> Tensor:
    """`sum_slots` in one launch. Contiguous FP32, BF16 or FP16 rows."""
    tokens, slots = positions_TK.shape
    width = rows_RD.shape[1]
    out_TD = torch.empty((tokens, width), dtype=rows_RD.dtype, device=rows_RD.device)
    if out_TD.numel():
        program_width = row_width(width)
        _sum_slots[(tokens, contiguous_blocks(width, program_width))](
            rows_RD, positions_TK, out_TD, width, K=slots, WIDTH=program_width
        )
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
        return sum_slots_triton(rows_RD.contiguous(), positions_TK.contiguous())
    return sum_slots_reference(rows_RD, positions_TK)


def _check_rows(fp8_TD: Tensor, scales_TJ: Tensor, order: PaddedOrder) -> None:
    tokens = len(order.positions_TK)
    check_tensor("fp8_TD", fp8_TD, (tokens, None), FP8_DTYPES, strides=(None, 1))
    check_tensor("scales_TJ", scales_TJ, (tokens, None), (torch.float32,), like=fp8_TD)
    check_tensor("positions_TK", order.positions_TK, (tokens, None), (torch.int32,), like=fp8_TD)


def permute_fp8_reference(fp8_TD: Tensor, scales_TJ: Tensor, order: PaddedOrder) -> tuple[Tensor, Tensor]:
    """`permute_fp8` in PyTorch."""
    _check_rows(fp8_TD, scales_TJ, order)
    # Pairs of non-local experts are written to one additional row, which is then removed.
    places_R = torch.where(order.positions_TK < 0, order.capacity, order.positions_TK).flatten().long()

    def permuted(x_TX: Tensor, fill: int) -> Tensor:
        expanded_RX = x_TX.repeat_interleave(order.positions_TK.shape[1], 0)
        rows_RX = x_TX.new_full((order.capacity + 1, x_TX.shape[1]), fill)
        return rows_RX.index_copy_(0, places_R, expanded_RX)[: order.capacity]

    return permuted(fp8_TD.view(torch.uint8), 0).view(fp8_TD.dtype), permuted(scales_TJ, 1)


def permute_fp8_triton(fp8_TD: Tensor, scales_TJ: Tensor, order: PaddedOrder) -> tuple[Tensor, Tensor]:
    """`permute_fp8` in one launch."""
    _check_rows(fp8_TD, scales_TJ, order)
    (tokens, width), scales = fp8_TD.shape, scales_TJ.shape[1]
    rows_RD = torch.empty((order.capacity, width), dtype=torch.uint8, device=fp8_TD.device)
    row_scales_RJ = scales_TJ.new_empty((order.capacity, scales))
    if rows_RD.numel():
        program_width = row_width(width)
        experts, slots = len(order.counts_E), order.positions_TK.shape[1]
        _permute[(experts + tokens, contiguous_blocks(width, program_width) + 1)](
            fp8_TD.view(torch.uint8), scales_TJ, rows_RD, row_scales_RJ,
            order.positions_TK, order.offsets_E1, order.counts_E, fp8_TD.stride(0), width, scales, experts,
            K=slots, WIDTH=program_width, SCALES=triton.next_power_of_2(scales),
        )  # fmt: skip
    return rows_RD.view(fp8_TD.dtype), row_scales_RJ


def permute_fp8(fp8_TD: Tensor, scales_TJ: Tensor, order: PaddedOrder) -> tuple[Tensor, Tensor]:
    """Copies each token, E4M3 numbers and FP32 scales, to the positions of its slots: (rows_RD, scales_RJ).

    The padding between experts is zeros with scale 1, so its products are zeros. On a GPU, rows from offsets_E1[-1] on
    are not written, and must not be read. Tokens may be apart, as in messages that carry more than the numbers. Raises
    ValueError if shapes, dtypes or devices do not match.
    """
    if backend(fp8_TD) == "triton":
        return permute_fp8_triton(fp8_TD, scales_TJ.contiguous(), order)
    return permute_fp8_reference(fp8_TD, scales_TJ, order)
