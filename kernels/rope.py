"""Rotary position embedding over interleaved pairs, with one position per token.

DeepSeek-V2 §2.1.3 ("decoupled RoPE"): only `qk_rope_head_dim` elements of a head rotate, and all heads share one
rotated key. Elements (2i, 2i + 1) are a pair that rotates by position * theta^(-2i / dim). Pairs keep their positions;
implementations that move the even elements to the front compute the same dot products.

Notable: angles are FP32 for FP32 and BF16 inputs, as in every other implementation for these weights. At position
131,071 an FP32 angle is off by 0.008 rad, and a model must be served with the angles it was trained with. FP64 inputs
get FP64 angles, for tests.

The Triton kernel accepts a slice of a wider row and separates the pairs in registers, so every load and store accesses
adjacent elements. Its backward is the same kernel with negated angles.

Shapes: B batch, T tokens, H heads, P rotated elements of a head, Q = P / 2 pairs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moray.kernels.util.arguments import FLOAT_DTYPES, check_tensor
from moray.kernels.util.backend import backend, rounded, row_offset

_TILE = 2048  # maximum elements per CTA


def rope_table(
    positions_BT: Tensor,
    dim: int,
    theta: float,
    dtype: torch.dtype,
    scales: Sequence[float] | None = None,
    magnitude: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns (cos_BTQ, sin_BTQ) for integer positions; FP64 if `dtype` is FP64, else FP32.

    Context extension (`models.yarn`) multiplies each pair's frequency by its scale, and both tables by `magnitude`.
    """
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    device = positions_BT.device
    frequencies_Q = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=compute_dtype, device=device) / dim)
    if scales is not None:
        frequencies_Q = frequencies_Q * torch.tensor(scales, dtype=compute_dtype, device=device)
    angles_BTQ = positions_BT.to(compute_dtype).unsqueeze(-1) * frequencies_Q
    return angles_BTQ.cos() * magnitude, angles_BTQ.sin() * magnitude


def rope_reference(x_BTHP: Tensor, cos_BTQ: Tensor, sin_BTQ: Tensor) -> Tensor:
    """Rotates every pair of `x_BTHP` by its token's angle; returns the same shape and dtype."""
    cos, sin = cos_BTQ.unsqueeze(-2), sin_BTQ.unsqueeze(-2)
    even, odd = torch.unflatten(x_BTHP.to(cos.dtype), -1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x_BTHP.dtype)


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, N, T, H, P, x_batch, x_token, x_head, table_batch, table_token,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, OPPOSITE: tl.constexpr,
):  # fmt: skip
    """Rotates some heads of some of the N = B * T tokens."""
    tokens = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[None, :, None]
    columns = tl.arange(0, WIDTH)[None, None, :]
    inside = (tokens < N) & (heads < H) & (columns < P)
    batch, token = tokens // T, tokens % T
    at = row_offset(batch, x_batch) + row_offset(token, x_token) + row_offset(heads, x_head) + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(x.to(tl.float32), [TOKENS, HEADS, WIDTH // 2, 2]))
    pairs = tl.arange(0, WIDTH // 2)[None, None, :]
    at, known = row_offset(batch, table_batch) + row_offset(token, table_token) + pairs, (tokens < N) & (2 * pairs < P)
    cos = tl.load(cos_ptr + at, mask=known, other=0.0)
    sin = tl.load(sin_ptr + at, mask=known, other=0.0)
    if OPPOSITE:
        sin = -sin
    rotated = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [TOKENS, HEADS, WIDTH])
    at = row_offset(row_offset(tokens, H) + heads, P) + columns
    tl.store(y_ptr + at, rounded(rotated, x.dtype), mask=inside)


def _launch(x_BTHP: Tensor, cos_BTQ: Tensor, sin_BTQ: Tensor, opposite: bool) -> Tensor:
    batch, tokens, heads, size = x_BTHP.shape
    y_BTHP = torch.empty(x_BTHP.shape, dtype=x_BTHP.dtype, device=x_BTHP.device)
    if y_BTHP.numel():
        table_strides = cos_BTQ.expand(batch, tokens, size // 2).stride()[:2]
        width = triton.next_power_of_2(size)
        tile_heads = min(triton.next_power_of_2(heads), max(_TILE // width, 1))
        tile_tokens = max(_TILE // width // tile_heads, 1)
        grid = (triton.cdiv(batch * tokens, tile_tokens), triton.cdiv(heads, tile_heads))
        _rotate[grid](
            x_BTHP, cos_BTQ, sin_BTQ, y_BTHP, batch * tokens, tokens, heads, size, *x_BTHP.stride()[:3], *table_strides,
            TOKENS=tile_tokens, HEADS=tile_heads, WIDTH=width, OPPOSITE=opposite,
        )  # fmt: skip
    return y_BTHP


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHP: Tensor, cos_BTQ: Tensor, sin_BTQ: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTQ, sin_BTQ)
        return _launch(x_BTHP, cos_BTQ, sin_BTQ, opposite=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHP: Tensor) -> tuple[Tensor, None, None]:
        cos_BTQ, sin_BTQ = ctx.saved_tensors
        return _launch(_dense_heads(dy_BTHP), cos_BTQ, sin_BTQ, opposite=True), None, None


def _dense_heads(x_BTHP: Tensor) -> Tensor:
    return x_BTHP if x_BTHP.stride(-1) == 1 else x_BTHP.contiguous()


def rope_triton(x_BTHP: Tensor, cos_BTQ: Tensor, sin_BTQ: Tensor) -> Tensor:
    """Equals the reference, except that a GPU's fused multiply-add rounds once instead of twice.

    `x_BTHP` is FP32, BF16 or FP16, with stride 1 in the last axis. The tables are FP32, contiguous, with 1 or B batches
    and 1 or T tokens. Returns a contiguous tensor. Differentiable once, in `x_BTHP` only. Raises ValueError for invalid
    arguments.
    """
    check_tensor("x_BTHP", x_BTHP, (None,) * 4, FLOAT_DTYPES, strides=(None, None, None, 1))
    batch, tokens, _, size = x_BTHP.shape
    if size % 2:
        raise ValueError(f"x_BTHP has shape {tuple(x_BTHP.shape)}, expected an even last axis: pairs are rotated")
    shared = [1 if axis == 1 else full for axis, full in zip(cos_BTQ.shape, (batch, tokens), strict=False)]
    check_tensor("cos_BTQ", cos_BTQ, (*shared, size // 2), (torch.float32,), like=x_BTHP)
    check_tensor("sin_BTQ", sin_BTQ, cos_BTQ.shape, (torch.float32,), like=x_BTHP)
    y_BTHP: Tensor = _Rope.apply(x_BTHP, cos_BTQ, sin_BTQ)  # type: ignore[no-untyped-call]
    return y_BTHP


def rope(x_BTHP: Tensor, cos_BTQ: Tensor, sin_BTQ: Tensor) -> Tensor:
    """Rotates every pair of `x_BTHP` by its token's angle; returns the same shape and dtype.

    The tables have 1 or B batches; no gradient reaches them on a GPU.
    """
    if torch.float64 in (x_BTHP.dtype, cos_BTQ.dtype) or backend(x_BTHP) == "reference":
        return rope_reference(x_BTHP, cos_BTQ, sin_BTQ)
    return rope_triton(_dense_heads(x_BTHP), cos_BTQ.contiguous(), sin_BTQ.contiguous())
