"""The backward of attention as two Triton kernels: the gradient of queries, and those of keys and values.

Both recompute the weights from the forward's log-sum-exp. Each number is summed by one CTA in a fixed order, so the
same inputs give the same bits.

Shapes: B rows, T tokens, H heads, A elements of a query or key head, V elements of a value head.
"""

from math import log
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.attention_tiles import (
    KernelBlocks,
    compile_options,
    dot,
    dot_parts,
    head_start,
    is_visible,
    key_range,
    load_parts,
    load_tile,
    store_tile,
)
from moray.kernels.util.backend import row_offset


@triton.jit
def _query_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr, dout_ptr, delta_ptr, dq_ptr,
    q_strides, k_strides, v_strides, scale, dscale, T, H, S: tl.constexpr,
):  # fmt: skip
    """The gradient of BQ queries of one head, and their delta (output times its gradient), which the key kernel also
    uses."""
    query = (tl.num_programs(0) - 1 - tl.program_id(0)) * S.BQ
    head, row = tl.program_id(1), tl.program_id(2)
    k_ptr, v_ptr = head_start(k_ptr, row, head, k_strides), head_start(v_ptr, row, head, v_strides)
    queries = query + tl.arange(0, S.BQ)
    start_ptr += row_offset(row, T)
    starts = tl.load(start_ptr + queries, mask=queries < T, other=0)
    values = row_offset(row_offset(row, T) * H + head, S.V)
    dout = load_tile(dout_ptr + values, query, T, H * S.V, 0, S.V, S.BQ, S.V0)
    out = load_tile(out_ptr + values, query, T, H * S.V, 0, S.V, S.BQ, S.V0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    numbers = row_offset(row_offset(row, H) + head, T) + queries
    tl.store(delta_ptr + numbers, delta, mask=queries < T)
    lse = tl.load(lse_ptr + numbers, mask=queries < T, other=0.0)
    q0, q1 = load_parts(head_start(q_ptr, row, head, q_strides), query, T, q_strides[1], S, S.BQ)
    dq0 = tl.zeros((S.BQ, S.A0), dtype=tl.float32)
    dq1 = tl.zeros((S.BQ, max(S.A1, 1)), dtype=tl.float32)
    for part in tl.static_range(3):
        begin, end = key_range(start_ptr, query, T, part, S)
        for key in range(begin, end, S.BK):
            k0, k1 = load_parts(k_ptr, key, T, k_strides[1], S, S.BK)
            weights = tl.exp2(dot_parts(q0, q1, k0, k1, S) * scale - lse[:, None])
            if part != 1:
                keys = key + tl.arange(0, S.BK)
                visible = is_visible(queries[:, None], keys[None, :], starts[:, None])
                weights = tl.where(visible, weights, 0.0)
            v = load_tile(v_ptr, key, T, v_strides[1], 0, S.V, S.BK, S.V0)
            dweights = dot(dout, v.T, tl.zeros((S.BQ, S.BK), dtype=tl.float32))
            dscores = (weights * (dweights - delta[:, None])).to(k0.dtype)
            dq0 = dot(dscores, k0, dq0)
            if S.A1 > 0:
                dq1 = dot(dscores, k1, dq1)
    dq_ptr += row_offset(row_offset(row, T) * H + head, S.A)
    store_tile(dq_ptr, dq0 * dscale, query, T, H * S.A, 0, S.A)
    if S.A1 > 0:
        store_tile(dq_ptr, dq1 * dscale, query, T, H * S.A, S.A0, S.A)


@triton.jit
def _key_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, start_ptr, end_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, scale, dscale, T, H, S: tl.constexpr,
):  # fmt: skip
    """The gradients of BK keys of one head and of their values. Scores are transposed, [BK, BQ], so that the weights
    and the gradients of scores can be the first factors of GEMMs without a transpose."""
    key = tl.program_id(0) * S.BK
    head, row = tl.program_id(1), tl.program_id(2)
    q_ptr = head_start(q_ptr, row, head, q_strides)
    dout_ptr += row_offset(row_offset(row, T) * H + head, S.V)
    lse_ptr += row_offset(row_offset(row, H) + head, T)
    delta_ptr += row_offset(row_offset(row, H) + head, T)
    keys = key + tl.arange(0, S.BK)
    k0, k1 = load_parts(head_start(k_ptr, row, head, k_strides), key, T, k_strides[1], S, S.BK)
    v = load_tile(head_start(v_ptr, row, head, v_strides), key, T, v_strides[1], 0, S.V, S.BK, S.V0)
    dk0 = tl.zeros((S.BK, S.A0), dtype=tl.float32)
    dk1 = tl.zeros((S.BK, max(S.A1, 1)), dtype=tl.float32)
    dv = tl.zeros((S.BK, S.V0), dtype=tl.float32)
    start_ptr += row_offset(row, T)
    last = tl.load(end_ptr + row_offset(row, T) + tl.minimum(key + S.BK, T) - 1)
    # All blocks are masked: a second loop, for blocks that need no mask, would exceed the available registers.
    for query in range(key, last, S.BQ):
        queries = query + tl.arange(0, S.BQ)
        starts = tl.load(start_ptr + queries, mask=queries < T, other=0)
        q0, q1 = load_parts(q_ptr, query, T, q_strides[1], S, S.BQ)
        # Queries after the last are zeros, and so are their outputs' gradients: they add nothing.
        lse = tl.load(lse_ptr + queries, mask=queries < T, other=0.0)
        weights = tl.exp2(dot_parts(k0, k1, q0, q1, S) * scale - lse[None, :])
        weights = tl.where(is_visible(queries[None, :], keys[:, None], starts[None, :]), weights, 0.0)
        dout = load_tile(dout_ptr, query, T, H * S.V, 0, S.V, S.BQ, S.V0)
        dv = dot(weights.to(dout.dtype), dout, dv)
        delta = tl.load(delta_ptr + queries, mask=queries < T, other=0.0)
        dweights = dot(v, dout.T, tl.zeros((S.BK, S.BQ), dtype=tl.float32))
        dscores = (weights * (dweights - delta[None, :])).to(q0.dtype)
        dk0 = dot(dscores, q0, dk0)
        if S.A1 > 0:
            dk1 = dot(dscores, q1, dk1)
    dk_ptr += row_offset(row_offset(row, T) * H + head, S.A)
    store_tile(dk_ptr, dk0 * dscale, key, T, H * S.A, 0, S.A)
    if S.A1 > 0:
        store_tile(dk_ptr, dk1 * dscale, key, T, H * S.A, S.A0, S.A)
    store_tile(dv_ptr + row_offset(row_offset(row, T) * H + head, S.V), dv, key, T, H * S.V, 0, S.V)


def _ends(start_BT: Tensor) -> Tensor:
    """The position after the last token of each token's document, int32 [B, T]. Exactly the tokens before it belong to
    documents that start no later than the token's position."""
    places_T = torch.arange(start_BT.shape[1], dtype=torch.int32, device=start_BT.device)
    return torch.searchsorted(start_BT, places_T.expand_as(start_BT).contiguous(), right=True, out_int32=True)


class SavedTensors(NamedTuple):
    """Tensors saved by the forward: inputs, output, log-sum-exp, and the start of each token's document."""

    q_BTHA: Tensor
    k_BTHA: Tensor
    v_BTHV: Tensor
    out_BTHV: Tensor
    lse_BHT: Tensor
    start_BT: Tensor


def attention_backward(
    saved: SavedTensors, dout_BTHV: Tensor, scale: float, blocks: KernelBlocks
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, contiguous, each in its tensor's dtype."""
    q, k, v, out_BTHV, lse_BHT, start_BT = saved
    batch, length, heads, _ = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not out_BTHV.numel():
        return dq.zero_(), dk.zero_(), dv
    dout_BTHV, delta_BHT = dout_BTHV.contiguous(), torch.empty_like(lse_BHT)
    strides = [x.stride()[:3] for x in (q, k, v)]
    numbers = (scale / log(2), scale, length, heads)
    _query_kernel[(triton.cdiv(length, blocks.queries.queries), heads, batch)](
        q, k, v, out_BTHV, lse_BHT, start_BT, dout_BTHV, delta_BHT, dq, *strides, *numbers,
        **compile_options(q, v, blocks.queries),
    )  # fmt: skip
    _key_kernel[(triton.cdiv(length, blocks.keys.keys), heads, batch)](
        q, k, v, lse_BHT, start_BT, _ends(start_BT), dout_BTHV, delta_BHT, dk, dv, *strides, *numbers,
        **compile_options(q, v, blocks.keys),
    )  # fmt: skip
    return dq, dk, dv
