"""The forward of attention as a Triton kernel: a running maximum and sum over blocks of keys ("online softmax").

It saves the log-sum-exp of every query (base 2), from which the backward recomputes the weights.

Shapes: B rows, T tokens, H heads, A elements of a query or key head, V elements of a value head.
"""

from math import log

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.attention_tiles import (
    TileShape,
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
def _output_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr,
    q_strides, k_strides, v_strides, scale, T, H, S: tl.constexpr,
):  # fmt: skip
    """Computes BQ queries of one head. Late queries have more keys, so they are started first."""
    query = (tl.num_programs(0) - 1 - tl.program_id(0)) * S.BQ
    head, row = tl.program_id(1), tl.program_id(2)
    k_ptr, v_ptr = head_start(k_ptr, row, head, k_strides), head_start(v_ptr, row, head, v_strides)
    queries = query + tl.arange(0, S.BQ)
    start_ptr += row_offset(row, T)
    starts = tl.load(start_ptr + queries, mask=queries < T, other=0)
    q0, q1 = load_parts(head_start(q_ptr, row, head, q_strides), query, T, q_strides[1], S, S.BQ)
    out = tl.zeros((S.BQ, S.V0), dtype=tl.float32)
    top = tl.full((S.BQ,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((S.BQ,), dtype=tl.float32)
    for part in tl.static_range(3):
        begin, end = key_range(start_ptr, query, T, part, S)
        for key in range(begin, end, S.BK):
            k0, k1 = load_parts(k_ptr, key, T, k_strides[1], S, S.BK)
            scores = dot_parts(q0, q1, k0, k1, S)
            if part != 1:
                keys = key + tl.arange(0, S.BK)
                visible = is_visible(queries[:, None], keys[None, :], starts[:, None])
                scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            # A query without visible keys so far has no largest score.
            base = tl.where(higher == float("-inf"), 0.0, higher * scale)
            weights = tl.exp2(scores * scale - base[:, None])
            keep = tl.exp2(top * scale - base)
            total = total * keep + tl.sum(weights, axis=1)
            v = load_tile(v_ptr, key, T, v_strides[1], 0, S.V, S.BK, S.V0)
            out = dot(weights.to(v.dtype), v, out * keep[:, None])
            top = higher
    out_ptr += row_offset(row_offset(row, T) * H + head, S.V)
    store_tile(out_ptr, out / total[:, None], query, T, H * S.V, 0, S.V)
    lse_ptr += row_offset(row_offset(row, H) + head, T)
    tl.store(lse_ptr + queries, top * scale + tl.log2(total), mask=queries < T)


def attention_forward(
    q_BTHA: Tensor, k_BTHA: Tensor, v_BTHV: Tensor, scale: float, start_BT: Tensor, tile: TileShape
) -> tuple[Tensor, Tensor]:
    """Returns (output [B, T, H, V] in v's dtype, log-sum-exp FP32 [B, H, T]). start_BT: int32, the position in its row
    where each token's document begins."""
    batch, length, heads, _ = q_BTHA.shape
    out_BTHV = torch.empty(v_BTHV.shape, dtype=v_BTHV.dtype, device=v_BTHV.device)
    lse_BHT = torch.empty((batch, heads, length), dtype=torch.float32, device=v_BTHV.device)
    if out_BTHV.numel():
        _output_kernel[(triton.cdiv(length, tile.queries), heads, batch)](
            q_BTHA, k_BTHA, v_BTHV, out_BTHV, lse_BHT, start_BT,
            q_BTHA.stride()[:3], k_BTHA.stride()[:3], v_BTHV.stride()[:3], scale / log(2), length, heads,
            **compile_options(q_BTHA, v_BTHV, tile),
        )  # fmt: skip
    return out_BTHV, lse_BHT
