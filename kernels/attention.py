"""Causal attention for training, over whole rows or over the documents packed in them.

The Triton form (GPUs) holds no scores: a block of queries walks over blocks of keys with a running maximum and sum
("online softmax"), and the backward computes the scores again from the log-sum-exp that the forward keeps. One kernel
makes the gradient of queries, another those of keys and values: each number is summed by one program in one order, so
that the same inputs give the same bits. DocumentBounds are runs, so the keys that a block of queries sees are one
range, and so are the queries that see a block of keys. Ranges are read on the device; what lies outside is not visited.

Notable: value heads of multi-head latent attention are narrower than its query heads. The Triton form takes them as
they are, and a query head of 192 elements as 128 and 64, both powers of two, instead of 256 with a quarter of zeros.

Notable: PyTorch's fused attention on the CPU takes only equal sizes, so there values are padded with zeros. With packed
documents, the CPU runs one fused call per document instead of masking whole rows: it never computes the blocks between
documents. One thread, B=8, H=4, heads of 48 and 32, forward + backward, ms (documents of 100 tokens):

              fused causal   unfused causal   fused with a mask   fused per document
    T=256               23               25                  20                   13
    T=512               76              120                  77                   30

Other devices that run the reference take the mask, which needs no lengths on the host.

Accuracy of the Triton form against float64: scores, sums and products are FP32, but the weights are rounded to the
rows' dtype before they multiply the values, and so is the result. With u = 2^-8 for BF16, 2^-11 for FP16, each of the
two moves an output by at most u times the largest value; so an output is off by at most 2 u of that, plus FP32's share,
2^-22 times the largest score. Scores' gradients are rounded the same way before they multiply queries and keys.

Shapes: B rows, T tokens, H heads, A elements of a query or key head, V elements of a value head.
"""

from dataclasses import dataclass
from math import log
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moray.kernels.util.arguments import WIDE_DTYPES, check_tensor
from moray.kernels.util.backend import INTERPRETED, backend, row_offset
from moray.kernels.util.documents import DocumentBounds


def _fused(q_BTHA: Tensor, k_BTHA: Tensor, v_BTHA: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    q, k, v = q_BTHA.transpose(1, 2), k_BTHA.transpose(1, 2), v_BTHA.transpose(1, 2)
    out_BHTA = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out_BHTA.transpose(1, 2)


def _per_document(q_BTHA: Tensor, k_BTHA: Tensor, v_BTHA: Tensor, scale: float, lengths: tuple[int, ...]) -> Tensor:
    parts = zip(*(torch.split(x.flatten(0, 1), list(lengths)) for x in (q_BTHA, k_BTHA, v_BTHA)), strict=True)
    outputs = [_fused(q[None], k[None], v[None], scale, None)[0] for q, k, v in parts]
    return torch.cat(outputs).view_as(q_BTHA)


def pad_values(v_BTHV: Tensor, width: int) -> Tensor:
    """Value heads filled up with zeros to the width of query heads, if they are narrower."""
    return v_BTHV if v_BTHV.shape[-1] == width else F.pad(v_BTHV, (0, width - v_BTHV.shape[-1]))


def document_mask(documents: DocumentBounds) -> Tensor:
    """True where a query (row of the last two axes) sees a key: same document, not later. [B, 1, T, T]."""
    index_BT = documents.index_BT
    same = index_BT[:, None, :, None] == index_BT[:, None, None, :]
    return same.tril()


def _check_width(q_BTHA: Tensor, v_BTHV: Tensor) -> None:
    if v_BTHV.shape[-1] > q_BTHA.shape[-1]:
        raise ValueError(f"value heads of {v_BTHV.shape[-1]} are wider than query heads of {q_BTHA.shape[-1]}")


def causal_attention_reference(
    q_BTHA: Tensor, k_BTHA: Tensor, v_BTHV: Tensor, scale: float, documents: DocumentBounds | None = None
) -> Tensor:
    """softmax(scale * q k^T) v over earlier tokens of the same document (of the row without `documents`).

    Returns [B, T, H, V]. V must not exceed A.
    """
    _check_width(q_BTHA, v_BTHV)
    v_BTHA = pad_values(v_BTHV, q_BTHA.shape[-1])
    batch = q_BTHA.shape[0]
    if documents is None or (documents.lengths is not None and len(documents.lengths) == batch):
        out = _fused(q_BTHA, k_BTHA, v_BTHA, scale, None)
    elif documents.lengths is not None:
        out = _per_document(q_BTHA, k_BTHA, v_BTHA, scale, documents.lengths)
    else:
        out = _fused(q_BTHA, k_BTHA, v_BTHA, scale, document_mask(documents))
    return out[..., : v_BTHV.shape[-1]]


@dataclass(frozen=True)
class TileShape:
    """Queries and keys of a program's step, its warps, and the stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class KernelBlocks:
    """The blocks of the three kernels: the output, the gradient of queries, that of keys and values."""

    forward: TileShape
    queries: TileShape
    keys: TileShape


# Three stages where they fit: with two, a step's rows are asked for only when the step before is almost done.
_HALF = KernelBlocks(TileShape(128, 64, 8, 3), TileShape(128, 64, 8, 3), TileShape(32, 128, 8, 3))
_HALF_WIDE = KernelBlocks(TileShape(64, 32, 4, 2), TileShape(64, 32, 8, 2), TileShape(32, 64, 8, 2))
# FP32 products run on the plain cores, with both factors in registers.
_FULL = KernelBlocks(TileShape(32, 16, 8, 1), TileShape(16, 16, 8, 1), TileShape(32, 32, 8, 1))
_WIDEST = 256


@triton.jit
def dot(a, b, c):
    """a b + c in FP32; FP32 factors keep all their bits. (The interpreter of Triton 3.6 and 3.7 multiplies the bit
    patterns of BF16 numbers.)"""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _head(ptr, row, head, strides):
    """Where the matrix [T, elements] of one row's head begins."""
    return ptr + row_offset(row, strides[0]) + row_offset(head, strides[2])


@triton.jit
def _load(ptr, row, limit, stride, AT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS rows from `row` and COLUMNS columns from AT of a matrix of limit x WIDTH; zeros outside."""
    rows, columns = tl.arange(0, ROWS), AT + tl.arange(0, COLUMNS)
    inside = (row + rows < limit)[:, None]
    if AT + COLUMNS > WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    at = ptr + row_offset(row, stride) + (rows[:, None] * stride + columns[None, :])
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(ptr, x, row, limit, stride, AT: tl.constexpr, WIDTH: tl.constexpr):
    """Rounds x to the matrix's dtype and stores it where `_load` would read it."""
    rows, columns = tl.arange(0, x.shape[0]), AT + tl.arange(0, x.shape[1])
    inside = (row + rows < limit)[:, None] & (columns < WIDTH)[None, :]
    at = ptr + row_offset(row, stride) + (rows[:, None] * stride + columns[None, :])
    tl.store(at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _parts(ptr, row, limit, stride, A: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows of a matrix of width A, in one or two parts (the second is the first where there is none)."""
    first = _load(ptr, row, limit, stride, 0, A, ROWS, A0)
    second = first
    if A1 > 0:
        second = _load(ptr, row, limit, stride, A0, A, ROWS, A1)
    return first, second


@triton.jit
def _scores(a0, a1, b0, b1, A1: tl.constexpr):
    """a b^T, of rows in parts."""
    scores = dot(a0, b0.T, tl.zeros((a0.shape[0], b0.shape[0]), dtype=tl.float32))
    if A1 > 0:
        scores = dot(a1, b1.T, scores)
    return scores


@triton.jit
def _keys_of(start_ptr, query, T, PART: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr):
    """[begin, end) of the keys that BQ queries walk over: part 1 is what all of them see, parts 0 and 2 its edges."""
    last = tl.minimum(query + BQ, T)
    first = tl.load(start_ptr + query)
    outer = first + (query - first) // BK * BK
    inner = tl.minimum(first + tl.cdiv(tl.load(start_ptr + last - 1) - first, BK) * BK, outer)
    if PART == 0:
        return first, inner
    elif PART == 1:
        return inner, outer
    else:
        return outer, last


@triton.jit
def _seen(queries, keys, starts):
    """Whether a query sees a key: arrays that broadcast, starts with queries."""
    return (keys <= queries) & (keys >= starts)


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr, q_strides, k_strides, v_strides, scale, T, H,
    A: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BQ queries of one head. Late ones, which see more keys, are started first."""
    query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ
    head, row = tl.program_id(1), tl.program_id(2)
    k_ptr, v_ptr = _head(k_ptr, row, head, k_strides), _head(v_ptr, row, head, v_strides)
    queries = query + tl.arange(0, BQ)
    start_ptr += row_offset(row, T)
    starts = tl.load(start_ptr + queries, mask=queries < T, other=0)
    q0, q1 = _parts(_head(q_ptr, row, head, q_strides), query, T, q_strides[1], A, A0, A1, BQ)
    out = tl.zeros((BQ, V0), dtype=tl.float32)
    top = tl.full((BQ,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BQ,), dtype=tl.float32)
    for part in tl.static_range(3):
        begin, end = _keys_of(start_ptr, query, T, part, BQ, BK)
        for key in range(begin, end, BK):
            k0, k1 = _parts(k_ptr, key, T, k_strides[1], A, A0, A1, BK)
            scores = _scores(q0, q1, k0, k1, A1)
            if part != 1:
                keys = key + tl.arange(0, BK)
                seen = _seen(queries[:, None], keys[None, :], starts[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            # A query that has seen no key yet has no largest score either.
            base = tl.where(higher == float("-inf"), 0.0, higher * scale)
            weights = tl.exp2(scores * scale - base[:, None])
            keep = tl.exp2(top * scale - base)
            total = total * keep + tl.sum(weights, axis=1)
            v = _load(v_ptr, key, T, v_strides[1], 0, V, BK, V0)
            out = dot(weights.to(v.dtype), v, out * keep[:, None])
            top = higher
    out_ptr += row_offset(row_offset(row, T) * H + head, V)
    _store(out_ptr, out / total[:, None], query, T, H * V, 0, V)
    lse_ptr += row_offset(row_offset(row, H) + head, T)
    tl.store(lse_ptr + queries, top * scale + tl.log2(total), mask=queries < T)


@triton.jit
def _query_gradient(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr, dout_ptr, delta_ptr, dq_ptr,
    q_strides, k_strides, v_strides, scale, dscale, T, H,
    A: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradient of BQ queries of one head, and their delta (output times its gradient), which keys need as well."""
    query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ
    head, row = tl.program_id(1), tl.program_id(2)
    k_ptr, v_ptr = _head(k_ptr, row, head, k_strides), _head(v_ptr, row, head, v_strides)
    queries = query + tl.arange(0, BQ)
    start_ptr += row_offset(row, T)
    starts = tl.load(start_ptr + queries, mask=queries < T, other=0)
    values = row_offset(row_offset(row, T) * H + head, V)
    dout = _load(dout_ptr + values, query, T, H * V, 0, V, BQ, V0)
    delta = tl.sum(_load(out_ptr + values, query, T, H * V, 0, V, BQ, V0).to(tl.float32) * dout.to(tl.float32), axis=1)
    numbers = row_offset(row_offset(row, H) + head, T) + queries
    tl.store(delta_ptr + numbers, delta, mask=queries < T)
    lse = tl.load(lse_ptr + numbers, mask=queries < T, other=0.0)
    q0, q1 = _parts(_head(q_ptr, row, head, q_strides), query, T, q_strides[1], A, A0, A1, BQ)
    dq0 = tl.zeros((BQ, A0), dtype=tl.float32)
    dq1 = tl.zeros((BQ, max(A1, 1)), dtype=tl.float32)
    for part in tl.static_range(3):
        begin, end = _keys_of(start_ptr, query, T, part, BQ, BK)
        for key in range(begin, end, BK):
            k0, k1 = _parts(k_ptr, key, T, k_strides[1], A, A0, A1, BK)
            weights = tl.exp2(_scores(q0, q1, k0, k1, A1) * scale - lse[:, None])
            if part != 1:
                keys = key + tl.arange(0, BK)
                seen = _seen(queries[:, None], keys[None, :], starts[:, None])
                weights = tl.where(seen, weights, 0.0)
            v = _load(v_ptr, key, T, v_strides[1], 0, V, BK, V0)
            dweights = dot(dout, v.T, tl.zeros((BQ, BK), dtype=tl.float32))
            dscores = (weights * (dweights - delta[:, None])).to(k0.dtype)
            dq0 = dot(dscores, k0, dq0)
            if A1 > 0:
                dq1 = dot(dscores, k1, dq1)
    dq_ptr += row_offset(row_offset(row, T) * H + head, A)
    _store(dq_ptr, dq0 * dscale, query, T, H * A, 0, A)
    if A1 > 0:
        _store(dq_ptr, dq1 * dscale, query, T, H * A, A0, A)


@triton.jit
def _key_gradient(
    q_ptr, k_ptr, v_ptr, lse_ptr, start_ptr, end_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, scale, dscale, T, H,
    A: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, V: tl.constexpr, V0: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradients of BK keys of one head and of their values. Scores lie transposed, [BK, BQ], so that weights and
    scores' gradients are first factors as they are, without a turn."""
    key = tl.program_id(0) * BK
    head, row = tl.program_id(1), tl.program_id(2)
    q_ptr = _head(q_ptr, row, head, q_strides)
    dout_ptr += row_offset(row_offset(row, T) * H + head, V)
    lse_ptr += row_offset(row_offset(row, H) + head, T)
    delta_ptr += row_offset(row_offset(row, H) + head, T)
    keys = key + tl.arange(0, BK)
    k0, k1 = _parts(_head(k_ptr, row, head, k_strides), key, T, k_strides[1], A, A0, A1, BK)
    v = _load(_head(v_ptr, row, head, v_strides), key, T, v_strides[1], 0, V, BK, V0)
    dk0 = tl.zeros((BK, A0), dtype=tl.float32)
    dk1 = tl.zeros((BK, max(A1, 1)), dtype=tl.float32)
    dv = tl.zeros((BK, V0), dtype=tl.float32)
    start_ptr += row_offset(row, T)
    last = tl.load(end_ptr + row_offset(row, T) + tl.minimum(key + BK, T) - 1)
    # All are masked: a second loop, for those that need no mask, takes more registers than there are.
    for query in range(key, last, BQ):
        queries = query + tl.arange(0, BQ)
        starts = tl.load(start_ptr + queries, mask=queries < T, other=0)
        q0, q1 = _parts(q_ptr, query, T, q_strides[1], A, A0, A1, BQ)
        # A query after the last is all zeros and so is its output's gradient: it adds nothing.
        lse = tl.load(lse_ptr + queries, mask=queries < T, other=0.0)
        weights = tl.exp2(_scores(k0, k1, q0, q1, A1) * scale - lse[None, :])
        weights = tl.where(_seen(queries[None, :], keys[:, None], starts[None, :]), weights, 0.0)
        dout = _load(dout_ptr, query, T, H * V, 0, V, BQ, V0)
        dv = dot(weights.to(dout.dtype), dout, dv)
        delta = tl.load(delta_ptr + queries, mask=queries < T, other=0.0)
        dweights = dot(v, dout.T, tl.zeros((BK, BQ), dtype=tl.float32))
        dscores = (weights * (dweights - delta[None, :])).to(q0.dtype)
        dk0 = dot(dscores, q0, dk0)
        if A1 > 0:
            dk1 = dot(dscores, q1, dk1)
    dk_ptr += row_offset(row_offset(row, T) * H + head, A)
    _store(dk_ptr, dk0 * dscale, key, T, H * A, 0, A)
    if A1 > 0:
        _store(dk_ptr, dk1 * dscale, key, T, H * A, A0, A)
    _store(dv_ptr + row_offset(row_offset(row, T) * H + head, V), dv, key, T, H * V, 0, V)


def _widths(width: int) -> tuple[int, int]:
    """The powers of two, 16 at least, that a head is read in: one that covers it, or two where that is less."""
    one = max(triton.next_power_of_2(width), 16)
    first = one // 2
    second = max(triton.next_power_of_2(width - first), 16) if width > first else 0
    return (first, second) if 0 < second < first else (one, 0)


def _covers(q_BTHA: Tensor, v_BTHV: Tensor) -> tuple[int, int, int]:
    """What heads are read in: (a query's first part, its second, a value)."""
    return (*_widths(q_BTHA.shape[-1]), max(triton.next_power_of_2(v_BTHV.shape[-1]), 16))


def _blocks(q_BTHA: Tensor, v_BTHV: Tensor) -> KernelBlocks:
    if q_BTHA.dtype == torch.float32:
        return _FULL
    return _HALF if sum(_covers(q_BTHA, v_BTHV)) <= 320 else _HALF_WIDE


def _sizes(q_BTHA: Tensor, v_BTHV: Tensor, blocks: TileShape) -> dict[str, Any]:
    """What all three kernels are made for."""
    first, second, value = _covers(q_BTHA, v_BTHV)
    return {
        "A": q_BTHA.shape[-1], "A0": first, "A1": second, "V": v_BTHV.shape[-1], "V0": value,
        "BQ": blocks.queries, "BK": blocks.keys, "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHA: Tensor,
        k_BTHA: Tensor,
        v_BTHV: Tensor,
        scale: float,
        start_BT: Tensor,
        blocks: KernelBlocks,
    ) -> Tensor:
        batch, length, heads, _ = q_BTHA.shape
        out_BTHV = torch.empty(v_BTHV.shape, dtype=v_BTHV.dtype, device=v_BTHV.device)
        lse_BHT = torch.empty((batch, heads, length), dtype=torch.float32, device=v_BTHV.device)
        if out_BTHV.numel():
            _forward[(triton.cdiv(length, blocks.forward.queries), heads, batch)](
                q_BTHA, k_BTHA, v_BTHV, out_BTHV, lse_BHT, start_BT,
                q_BTHA.stride()[:3], k_BTHA.stride()[:3], v_BTHV.stride()[:3], scale / log(2), length, heads,
                **_sizes(q_BTHA, v_BTHV, blocks.forward),
            )  # fmt: skip
        ctx.save_for_backward(q_BTHA, k_BTHA, v_BTHV, out_BTHV, lse_BHT, start_BT)
        ctx.scale, ctx.blocks = scale, blocks
        return out_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHA, k_BTHA, v_BTHV, out_BTHV, lse_BHT, start_BT = ctx.saved_tensors
        batch, length, heads, _ = q_BTHA.shape
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_BTHA, k_BTHA, v_BTHV))
        if not out_BTHV.numel():
            return dq.zero_(), dk.zero_(), dv, None, None, None
        dout_BTHV, delta_BHT = dout_BTHV.contiguous(), torch.empty_like(lse_BHT)
        strides = [x.stride()[:3] for x in (q_BTHA, k_BTHA, v_BTHV)]
        numbers = (ctx.scale / log(2), ctx.scale, length, heads)
        _query_gradient[(triton.cdiv(length, ctx.blocks.queries.queries), heads, batch)](
            q_BTHA, k_BTHA, v_BTHV, out_BTHV, lse_BHT, start_BT, dout_BTHV, delta_BHT, dq, *strides, *numbers,
            **_sizes(q_BTHA, v_BTHV, ctx.blocks.queries),
        )  # fmt: skip
        _key_gradient[(triton.cdiv(length, ctx.blocks.keys.keys), heads, batch)](
            q_BTHA, k_BTHA, v_BTHV, lse_BHT, start_BT, _ends(start_BT), dout_BTHV, delta_BHT, dk, dv,
            *strides, *numbers, **_sizes(q_BTHA, v_BTHV, ctx.blocks.keys),
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def _starts(documents: DocumentBounds | None, like: Tensor) -> Tensor:
    """The place in its row of the first token of each token's document: int32 [B, T]."""
    if documents is None:
        return torch.zeros(like.shape[:2], dtype=torch.int32, device=like.device)
    positions_BT = documents.positions_BT
    check_tensor(
        "documents.positions_BT", positions_BT, like.shape[:2], (torch.int64,), like=like, strides=(None, None)
    )
    return (torch.arange(positions_BT.shape[1], device=like.device) - positions_BT).int()


def _ends(start_BT: Tensor) -> Tensor:
    """The place behind the last token of each token's document, int32 [B, T]: of the tokens up to there, and of them
    alone, the documents begin no later than the token lies."""
    places_T = torch.arange(start_BT.shape[1], dtype=torch.int32, device=start_BT.device)
    return torch.searchsorted(start_BT, places_T.expand_as(start_BT).contiguous(), right=True, out_int32=True)


def causal_attention_triton(
    q_BTHA: Tensor,
    k_BTHA: Tensor,
    v_BTHV: Tensor,
    scale: float,
    documents: DocumentBounds | None = None,
    blocks: KernelBlocks | None = None,
) -> Tensor:
    """`causal_attention_reference` for BF16, FP16 and FP32, with gradients; contiguous [B, T, H, V].

    Any strides but for the last, which must be 1; heads of 256 elements at most; a positive `scale`. `blocks` is for
    tuning. Raises ValueError for what does not fit.
    """
    lead = tuple(q_BTHA.shape[:3])
    strides = (None, None, None, 1)
    check_tensor("q_BTHA", q_BTHA, (None,) * 4, WIDE_DTYPES, strides=strides)
    check_tensor("k_BTHA", k_BTHA, q_BTHA.shape, (q_BTHA.dtype,), like=q_BTHA, strides=strides)
    check_tensor("v_BTHV", v_BTHV, (*lead, None), (q_BTHA.dtype,), like=q_BTHA, strides=strides)
    _check_width(q_BTHA, v_BTHV)
    if q_BTHA.shape[-1] > _WIDEST:
        raise ValueError(f"query heads of {q_BTHA.shape[-1]}, expected {_WIDEST} at most")
    if not scale > 0:
        raise ValueError(f"scale = {scale}, expected a positive number")
    start_BT = _starts(documents, q_BTHA)
    blocks = blocks or _blocks(q_BTHA, v_BTHV)
    out: Tensor = _CausalAttention.apply(q_BTHA, k_BTHA, v_BTHV, scale, start_BT, blocks)  # type: ignore[no-untyped-call]
    return out


def attention_form(x: Tensor) -> Literal["reference", "triton"]:
    """What `causal_attention` runs for a tensor's device and dtype: there is no Triton form of FP64."""
    return "reference" if x.dtype == torch.float64 else backend(x)


def causal_attention(
    q_BTHA: Tensor, k_BTHA: Tensor, v_BTHV: Tensor, scale: float, documents: DocumentBounds | None = None
) -> Tensor:
    """softmax(scale * q k^T) v over earlier tokens of the same document (of the row without `documents`).

    Returns [B, T, H, V]. V must not exceed A.
    """
    if attention_form(q_BTHA) == "reference":
        return causal_attention_reference(q_BTHA, k_BTHA, v_BTHV, scale, documents)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHA, k_BTHA, v_BTHV))
    return causal_attention_triton(q, k, v, scale, documents)
