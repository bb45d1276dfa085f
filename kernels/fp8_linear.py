"""Linear maps in FP8: forward, gradient of the input and gradient of the weight (DeepSeek-V3 §3.3).

All three products take E4M3 numbers: activations and gradients in tiles of 1 x 128 along the axis that is summed over,
weights in blocks of 128 x 128. What the backward needs of the input is held in FP8, not in its own precision:

    y  = Q(x; 1x128) Q(w)^T        x [T, K], w [N, K]
    dx = Q(dy; 1x128) Q(w)         summed over N
    dw = Q(dy; 128x1)^T Q(x; 128x1)   summed over tokens

Notable: tiles of activations have scales that are powers of two, so x is turned from 1 x 128 into 128 x 1 tiles without
a second rounding of its mantissas (only what falls below the smallest number of the new tile is lost). The products are
computed from dequantised numbers in FP32: a product of two E4M3 numbers is exact there, and partial sums are FP32
throughout, as the promotion every 128 elements makes them on tensor cores.

The input of the linear map after attention is held in E5M6 instead, as in the paper: it feeds attention's backward,
too, and six bits of mantissa keep that gradient. It is held in 16 bits here; 12 would do.

Shapes: T rows, K inputs, N outputs, F inner elements of SwiGLU.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.kernels.quantize import COLUMN_TILES, ROW_TILES, WEIGHT_BLOCKS, dequantize, quantize


@dataclass(frozen=True)
class Fp8Weight:
    """A weight as the products see it: what its FP8 numbers and scales stand for, in FP32. [N, K]."""

    wide: Tensor


def fp8_weight(weight_NK: Tensor) -> Fp8Weight:
    """Quantises a weight, to be used until it changes."""
    fp8_and_scales = quantize(weight_NK.detach(), WEIGHT_BLOCKS)
    return Fp8Weight(dequantize(*fp8_and_scales, WEIGHT_BLOCKS))


def _rounded(x: Tensor, tiles: tuple[int, int]) -> Tensor:
    """What the FP8 form of `x` stands for, in FP32."""
    return dequantize(*quantize(x, tiles, power_of_two=True), tiles)


def e5m6_reference(x: Tensor) -> Tensor:
    """`x` rounded to six bits of mantissa (to nearest, ties to even), in FP32. The exponent's range is left as it is:
    activations stay far within that of five bits once a tile's scale is a power of two."""
    bits = x.float().contiguous().view(torch.int32)
    # Of 23 bits of mantissa 17 go: add half of what is cut, less one where the kept part is even.
    odd = (bits >> 17) & 1
    return ((bits + 0xFFFF + odd) & ~0x1FFFF).view(torch.float32)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, weight_NK: Tensor, quantized: Fp8Weight, e5m6: bool, dgrad_tiles: Any
    ) -> Tensor:
        if e5m6:
            held = e5m6_reference(x_TK)
            ctx.save_for_backward(held.bfloat16())
            rounded_TK = _rounded(held, ROW_TILES)
        else:
            fp8_TK, scales = quantize(x_TK, ROW_TILES, power_of_two=True)
            ctx.save_for_backward(fp8_TK, scales)
            rounded_TK = dequantize(fp8_TK, scales, ROW_TILES)
        ctx.quantized, ctx.dgrad_tiles = quantized, dgrad_tiles
        return (rounded_TK @ quantized.wide.t()).to(x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy_TN,) = grads
        held = ctx.saved_tensors
        x_TK = held[0].float() if len(held) == 1 else dequantize(held[0], held[1], ROW_TILES)
        dx_TK, dw_NK = None, None
        if ctx.needs_input_grad[0]:
            dx_TK = (_rounded(dy_TN, ctx.dgrad_tiles) @ ctx.quantized.wide).to(dy_TN.dtype)
        if ctx.needs_input_grad[1]:
            dw_NK = _rounded(dy_TN, COLUMN_TILES).t() @ _rounded(x_TK, COLUMN_TILES)
        return dx_TK, dw_NK, None, None, None


def fp8_linear_reference(
    x_TK: Tensor,
    weight_NK: Tensor,
    quantized: Fp8Weight,
    e5m6: bool = False,
    dgrad_tiles: tuple[int, int] = ROW_TILES,
) -> Tensor:
    """x @ weight^T in FP8, in x's dtype; differentiable in `x_TK` and in `weight_NK`, of which `quantized` is the FP8
    form.

    The weight's gradient is FP32. `e5m6`: how the input is held for the backward. `dgrad_tiles` is for experiments:
    blocks of 128 x 128 are known to diverge (DeepSeek-V3, appendix B.2).
    """
    shape = x_TK.shape
    out: Tensor = _Fp8Linear.apply(  # type: ignore[no-untyped-call]
        x_TK.reshape(-1, shape[-1]), weight_NK, quantized, e5m6, dgrad_tiles
    )
    return out.view(*shape[:-1], weight_NK.shape[0])


class _Fp8SwiGLUDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor, weight_NF: Tensor, quantized: Fp8Weight) -> Tensor:
        gate, up = quantize(gate_TF, ROW_TILES, power_of_two=True), quantize(up_TF, ROW_TILES, power_of_two=True)
        ctx.save_for_backward(*gate, *up)
        ctx.quantized = quantized
        inner_TF = F.silu(gate_TF.float()) * up_TF.float()
        return (_rounded(inner_TF, ROW_TILES) @ quantized.wide.t()).to(gate_TF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy_TN,) = grads
        gate_fp8, gate_scales, up_fp8, up_scales = ctx.saved_tensors
        gate_TF, up_TF = dequantize(gate_fp8, gate_scales, ROW_TILES), dequantize(up_fp8, up_scales, ROW_TILES)
        sigmoid_TF = gate_TF.sigmoid()
        silu_TF = gate_TF * sigmoid_TF
        d_inner_TF = _rounded(dy_TN, ROW_TILES) @ ctx.quantized.wide
        dw_NF = _rounded(dy_TN, COLUMN_TILES).t() @ _rounded(silu_TF * up_TF, COLUMN_TILES)
        d_silu_TF = sigmoid_TF * (1 + gate_TF * (1 - sigmoid_TF))
        d_gate_TF, d_up_TF = d_inner_TF * up_TF * d_silu_TF, d_inner_TF * silu_TF
        return d_gate_TF.to(dy_TN.dtype), d_up_TF.to(dy_TN.dtype), dw_NF, None


def fp8_swiglu_down_reference(gate_TF: Tensor, up_TF: Tensor, weight_NF: Tensor, quantized: Fp8Weight) -> Tensor:
    """(silu(gate) * up) @ weight^T in FP8. Gate and up are held in FP8, their product is computed again in the
    backward."""
    shape = gate_TF.shape
    out: Tensor = _Fp8SwiGLUDown.apply(  # type: ignore[no-untyped-call]
        gate_TF.reshape(-1, shape[-1]), up_TF.reshape(-1, shape[-1]), weight_NF, quantized
    )
    return out.view(*shape[:-1], weight_NF.shape[0])


fp8_linear = fp8_linear_reference
fp8_swiglu_down = fp8_swiglu_down_reference
