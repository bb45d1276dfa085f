"""Rotary position embedding over interleaved pairs, with one position per token.

DeepSeek-V2 §2.1.3 ("decoupled RoPE"): only `qk_rope_head_dim` elements of a head rotate, and all heads share one
rotated key. Elements (2i, 2i + 1) are a pair that turns by position * theta^(-2i / dim). Pairs stay where they are:
readers that move the even elements to the front compute the same dot products.

Notable: angles are FP32 for FP32 and BF16 rows, as in every other reader of these weights; at position 131,071 an
FP32 angle is off by 0.008 rad, and a model must be served with the angles it was trained with. FP64 rows get FP64
angles, for tests.

Shapes: B batch, T tokens, H heads, P rotated elements of a head, Q = P / 2 pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_table(
    positions_BT: Tensor,
    dim: int,
    theta: float,
    dtype: torch.dtype,
    scales: Sequence[float] | None = None,
    magnitude: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns (cos_BTQ, sin_BTQ) for integer positions; FP64 when `dtype` is, else FP32.

    Context extension (`models.yarn`) multiplies each pair's frequency by its scale, and both tables by `magnitude`.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    device = positions_BT.device
    frequencies_Q = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=wide, device=device) / dim)
    if scales is not None:
        frequencies_Q = frequencies_Q * torch.tensor(scales, dtype=wide, device=device)
    angles_BTQ = positions_BT.to(wide).unsqueeze(-1) * frequencies_Q
    return angles_BTQ.cos() * magnitude, angles_BTQ.sin() * magnitude


def rope_reference(x_BTHP: Tensor, cos_BTQ: Tensor, sin_BTQ: Tensor) -> Tensor:
    """Rotates every pair of `x_BTHP` by its token's angle; returns the same shape and dtype."""
    cos, sin = cos_BTQ.unsqueeze(-2), sin_BTQ.unsqueeze(-2)
    even, odd = torch.unflatten(x_BTHP.to(cos.dtype), -1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x_BTHP.dtype)


rope = rope_reference
