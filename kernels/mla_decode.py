"""Attention of absorbed queries over the paged latent cache (DeepSeek-V2 §2.1.2): one shared head of keys and values.

A position's key is its latent and its rotated part, and its value is the latent alone. So one read of the cache serves
both.

Notable: a new token of a sequence has one query per head, which gives too few CTAs to fill a GPU for few sequences. So
a sequence's positions are divided into equal splits ("flash decoding"). Each split produces a partial output with its
log-sum-exp, and a second kernel combines the partial outputs in order. The number of splits follows from sizes known to
the host, and their length from the position, on the device. The same inputs give the same bits; another batch or table
size may give different bits.

Notable: a CTA uses one token's heads, 64 at a time, as the rows of its GEMMs, so cached latents are loaded once for all
of them. A prompt's tokens use the same kernel. They fill the GPU without splits, and no scores are materialized; the
reference materializes T * H * L of them.

The accuracy and rounding of the Triton implementation are those of `kernels.attention`.

Shapes: B sequences, T new tokens of each, H heads, R latent elements, C = R + rotated elements, K blocks of the cache,
S slots of a block, N blocks of a table, L = N * S reachable positions, X splits.
"""

from dataclasses import dataclass
from math import log

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.attention import attention_backend
from moray.kernels.attention_tiles import dot
from moray.kernels.util.arguments import FLOAT_DTYPES, check_tensor
from moray.kernels.util.backend import row_offset

# CTAs that keep a GPU of 132 SMs busy, and the fewest positions that justify a CTA.
_PROGRAMS = 264
_SHORTEST_SPLIT = 256


def mla_decode_reference(
    q_BTHC: Tensor, cache_KSC: Tensor, tables_BN: Tensor, positions_BT: Tensor, scale: float, rank: int
) -> Tensor:
    """softmax(scale * q c^T) c[:rank] over the cached positions up to each token's own: [B, T, H, rank] of q's dtype.

    cache_KSC: one layer's blocks of slots. tables_BN: the n-th entry is the block that holds a sequence's positions
    from n * S on; entries beyond the sequence's last position are ignored. positions_BT: integers; -1 is padding and
    gives zeros.
    """
    cached_BLC = cache_KSC[tables_BN.long().clamp(min=0)].flatten(1, 2).to(q_BTHC.dtype)
    reach = torch.arange(cached_BLC.shape[1], device=q_BTHC.device)
    visible_BTL = reach <= positions_BT.clamp(min=0).unsqueeze(-1)
    scores_BTHL = torch.einsum("bthc,blc->bthl", q_BTHC, cached_BLC) * scale
    scores_BTHL = scores_BTHL.masked_fill(~visible_BTL.unsqueeze(2), float("-inf"))
    compute_dtype = torch.float64 if q_BTHC.dtype == torch.float64 else torch.float32
    weights_BTHL = scores_BTHL.softmax(-1, dtype=compute_dtype).to(q_BTHC.dtype)
    out_BTHR = torch.einsum("bthl,blc->bthc", weights_BTHL, cached_BLC[..., :rank])
    return out_BTHR.masked_fill((positions_BT < 0)[..., None, None], 0.0)


@dataclass(frozen=True)
class DecodeBlocks:
    """Heads and positions per iteration of a CTA, its warps, and the stages of its pipeline."""

    heads: int
    positions: int
    warps: int
    stages: int


def _blocks(dtype: torch.dtype, heads: int) -> DecodeBlocks:
    if dtype == torch.float32:
        return DecodeBlocks(16, 16, 8, 1)
    # Five stages: an iteration's slots are read two iterations before its latents, and those two before their use.
    if heads > 32:
        return DecodeBlocks(64, 32, 8, 5)
    return DecodeBlocks(32, 32, 8, 5) if heads > 16 else DecodeBlocks(16, 32, 4, 5)


@triton.jit
def _slots(table_ptr, first, length, S: tl.constexpr, BL: tl.constexpr):
    """The cache slots of positions [first, first + BL), up to `length`."""
    if S % BL == 0:
        return row_offset(tl.load(table_ptr + first // S), S) + first % S + tl.arange(0, BL)
    positions = first + tl.arange(0, BL)
    return row_offset(tl.load(table_ptr + positions // S, mask=positions < length, other=0), S) + positions % S


@triton.jit(do_not_specialize=["T", "N", "X"])
def _decode(
    q_ptr, cache_ptr, table_ptr, position_ptr, out_ptr, lse_ptr, scale, T, N, X, H: tl.constexpr,
    S: tl.constexpr, R: tl.constexpr, R0: tl.constexpr, P: tl.constexpr, P0: tl.constexpr,
    BH: tl.constexpr, BL: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Processes BH heads of one token over one of its X splits."""
    token, split = tl.program_id(0), tl.program_id(2)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    latent, rotated = tl.arange(0, R0), R + tl.arange(0, P0)
    has_head, has_latent, has_rotated = (heads < H)[:, None], (latent < R)[None, :], (rotated < R + P)[None, :]
    of_head = q_ptr + row_offset(row_offset(token, H) + heads[:, None], R + P)
    q0 = tl.load(of_head + latent[None, :], mask=has_head & has_latent, other=0.0)
    q1 = tl.load(of_head + rotated[None, :], mask=has_head & has_rotated, other=0.0)
    table_ptr += row_offset(token // T, N)
    length = tl.load(position_ptr + token).to(tl.int32) + 1
    reach = tl.cdiv(tl.cdiv(length, BL), X) * BL
    out = tl.zeros((BH, R0), dtype=tl.float32)
    top = tl.full((BH,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BH,), dtype=tl.float32)
    for first in range(split * reach, tl.minimum(split * reach + reach, length), BL):
        valid = first + tl.arange(0, BL) < length
        of_slot = cache_ptr + row_offset(_slots(table_ptr, first, length, S, BL)[:, None], R + P)
        c0 = tl.load(of_slot + latent[None, :], mask=valid[:, None] & has_latent, other=0.0).to(q0.dtype)
        c1 = tl.load(of_slot + rotated[None, :], mask=valid[:, None] & has_rotated, other=0.0).to(q0.dtype)
        scores = dot(q1, c1.T, dot(q0, c0.T, tl.zeros((BH, BL), dtype=tl.float32)))
        scores = tl.where(valid[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores * scale - (higher * scale)[:, None])
        keep = tl.exp2((top - higher) * scale)
        total = total * keep + tl.sum(weights, axis=1)
        out = dot(weights.to(c0.dtype), c0, out * keep[:, None])
        top = higher
    # A split without positions gives zeros, with log-sum-exp -inf.
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    part = row_offset(row_offset(split, tl.num_programs(0)) + token, H) + heads
    at = out_ptr + row_offset(part[:, None], R) + latent[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=has_head & has_latent)
    if SPLIT:
        tl.store(lse_ptr + part, top * scale + tl.log2(total), mask=heads < H)


@triton.jit(do_not_specialize=["X"])
def _combine(part_ptr, lse_ptr, out_ptr, X, R: tl.constexpr, R0: tl.constexpr, BX: tl.constexpr):
    """Combines the partial outputs of X splits of one token's head, BX at a time, weighted by their sums."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, R0)
    top = -float("inf")
    for first in range(0, X, BX):
        splits = first + tl.arange(0, BX)
        lse = tl.load(lse_ptr + row_offset(splits, rows) + row, mask=splits < X, other=float("-inf"))
        top = tl.maximum(top, tl.max(lse))
    top = tl.where(top == float("-inf"), 0.0, top)
    out, total = tl.zeros((R0,), dtype=tl.float32), 0.0
    for first in range(0, X, BX):
        splits = first + tl.arange(0, BX)
        lse = tl.load(lse_ptr + row_offset(splits, rows) + row, mask=splits < X, other=float("-inf"))
        at = part_ptr + row_offset(row_offset(splits, rows) + row, R)[:, None] + columns[None, :]
        parts = tl.load(at, mask=(splits < X)[:, None] & (columns < R)[None, :], other=0.0)
        weights = tl.exp2(lse - top)
        out += tl.sum(parts * weights[:, None], axis=0)
        total += tl.sum(weights)
    out = out / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row_offset(row, R) + columns, out.to(out_ptr.dtype.element_ty), mask=columns < R)


def _splits(programs: int, reach: int) -> int:
    """The number of splits that gives enough CTAs, such that none is too short at full reach."""
    return max(1, min(_PROGRAMS // programs, triton.cdiv(reach, _SHORTEST_SPLIT)))


def _check(q_BTHC: Tensor, cache_KSC: Tensor, tables_BN: Tensor, positions_BT: Tensor, scale: float, rank: int) -> None:
    check_tensor("q_BTHC", q_BTHC, (None,) * 4, FLOAT_DTYPES)
    batch, tokens, _, width = q_BTHC.shape
    check_tensor("cache_KSC", cache_KSC, (None, None, width), FLOAT_DTYPES, like=q_BTHC)
    check_tensor("tables_BN", tables_BN, (batch, None), (torch.int32, torch.int64), like=q_BTHC)
    check_tensor("positions_BT", positions_BT, (batch, tokens), (torch.int32, torch.int64), like=q_BTHC)
    if not scale > 0:
        raise ValueError(f"scale = {scale}, expected a positive number")
    if not 0 < rank <= width:
        raise ValueError(f"rank = {rank}, expected 1 to {width}")


def mla_decode_triton(
    q_BTHC: Tensor,
    cache_KSC: Tensor,
    tables_BN: Tensor,
    positions_BT: Tensor,
    scale: float,
    rank: int,
    *,
    blocks: DecodeBlocks | None = None,
    splits: int | None = None,
) -> Tensor:
    """`mla_decode_reference` for BF16, FP16 and FP32 of contiguous tensors; the cache may have another dtype than q.

    `scale` must be positive. Positions must lie within their table; this is not checked, because they are on the
    device. `blocks` and `splits` are for tuning. Raises ValueError for invalid arguments.
    """
    _check(q_BTHC, cache_KSC, tables_BN, positions_BT, scale, rank)
    batch, tokens, heads, width = q_BTHC.shape
    out_BTHR = torch.empty((batch, tokens, heads, rank), dtype=q_BTHC.dtype, device=q_BTHC.device)
    rows, slots = batch * tokens, cache_KSC.shape[1]
    reach = tables_BN.shape[1] * slots
    if not out_BTHR.numel() or not reach:
        return out_BTHR.zero_()
    blocks = blocks or _blocks(q_BTHC.dtype, heads)
    head_blocks = triton.cdiv(heads, blocks.heads)
    splits = splits or _splits(rows * head_blocks, reach)
    parts, lse = out_BTHR, None
    if splits > 1:
        parts = torch.empty((splits, rows * heads, rank), dtype=torch.float32, device=q_BTHC.device)
        lse = torch.empty((splits, rows * heads), dtype=torch.float32, device=q_BTHC.device)
    columns = max(triton.next_power_of_2(rank), 16)
    _decode[(rows, head_blocks, splits)](
        q_BTHC, cache_KSC, tables_BN, positions_BT, parts, lse, scale / log(2), tokens, tables_BN.shape[1], splits,
        H=heads, S=slots, R=rank, R0=columns, P=width - rank, P0=max(triton.next_power_of_2(width - rank), 16),
        BH=blocks.heads, BL=blocks.positions, SPLIT=splits > 1, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows * heads,)](parts, lse, out_BTHR, splits, R=rank, R0=columns, BX=16)
    return out_BTHR


def mla_decode(
    q_BTHC: Tensor, cache_KSC: Tensor, tables_BN: Tensor, positions_BT: Tensor, scale: float, rank: int
) -> Tensor:
    """softmax(scale * q c^T) c[:rank] over the cached positions up to each token's own: [B, T, H, rank] of q's dtype.

    cache_KSC: one layer's blocks of slots. tables_BN: the n-th entry is the block that holds a sequence's positions
    from n * S on; entries beyond the sequence's last position are ignored. positions_BT: integers; -1 is padding and
    gives zeros.
    """
    if attention_backend(q_BTHC) == "reference":
        return mla_decode_reference(q_BTHC, cache_KSC, tables_BN, positions_BT, scale, rank)
    q, tables, positions = q_BTHC.contiguous(), tables_BN.contiguous(), positions_BT.contiguous()
    return mla_decode_triton(q, cache_KSC, tables, positions, scale, rank)
