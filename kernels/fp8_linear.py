"""A linear layer in FP8: forward, gradient of the input (dgrad) and gradient of the weight (wgrad) (DeepSeek-V3 §3.3).

All three GEMMs multiply E4M3 numbers: activations and gradients in tiles of 1 x 128 along the summed axis, weights in
blocks of 128 x 128. The input is quantized along both axes in one pass, before the GEMMs. The backward saves only the
second quantization, one byte per element:

    y  = Q(x; 1x128) Q(w)^T            x [T, K], w [N, K]
    dx = Q(dy; 1x128) Q(w)             summed over N
    dw = Q(dy; 128x1)^T Q(x; 128x1)    summed over tokens

Notable: all scales are powers of two (for weights too, as in DeepSeek-V3.1). So rows received in FP8 can be transposed
without a second rounding of their mantissas, and every dequantized number is a BF16 number. On the CPU, GEMMs multiply
the dequantized numbers: exact products and FP32 sums, as on tensor cores with promotion every 128 elements. So a CPU
with BF16 units trains in FP8 at the speed of BF16.

If another operation saves the input anyway (`shared_input`: the layer after attention, whose backward needs attention's
output), the input is saved as it is and quantized in the backward. The numbers are the same, and there is no second
copy. DeepSeek-V3 saves this input in E5M6; `benchmarks/fp8_accuracy.py` compares the two.

Shapes: T rows, K inputs, N outputs.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moray.kernels.fp8_gemm import fp8_gemm, fp8_gemm_triton
from moray.kernels.quantize import ROW_TILES, WEIGHT_BLOCKS, dequantize, quantize, quantize_both
from moray.kernels.util.backend import backend
from moray.kernels.util.deferred import DeferredGradients, add_gradient

Quantized = tuple[Tensor, Tensor]  # FP8 numbers and their scales


@dataclass(frozen=True)
class Fp8Weight:
    """A quantized weight: E4M3 numbers [..., N, K] and power-of-two scales of blocks of 128 x 128."""

    fp8: Tensor
    scales: Tensor

    @cached_property
    def transposed(self) -> Quantized:
        """The transposed quantization, for the input's gradient on tensor cores, which require the summed axis last."""
        return self.fp8.transpose(-1, -2).contiguous(), self.scales.transpose(-1, -2).contiguous()

    @cached_property
    def dequantized(self) -> Tensor:
        """The dequantized weight in BF16, which represents it exactly; for GEMMs on the CPU."""
        return dequantize(self.fp8, self.scales, WEIGHT_BLOCKS, torch.bfloat16)

    def product(self, x: Quantized, dtype: torch.dtype) -> Tensor:
        """x w^T: [T, N]."""
        if backend(x[0]) == "triton":
            return fp8_gemm_triton(*x, self.fp8, self.scales, dtype=dtype)
        return dequantize(*x, dtype=dtype) @ self.dequantized.t().to(dtype)

    def input_gradient(self, dy: Quantized, dtype: torch.dtype) -> Tensor:
        """dy w: [T, K]."""
        if backend(dy[0]) == "triton":
            return fp8_gemm_triton(*dy, *self.transposed, dtype=dtype)
        return dequantize(*dy, dtype=dtype) @ self.dequantized.to(dtype)


def fp8_weight(weight: Tensor) -> Fp8Weight:
    """Quantizes a weight, or a stack of weights. The result is valid until it changes."""
    return Fp8Weight(*quantize(weight.detach(), WEIGHT_BLOCKS, power_of_two=True))


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        weight_NK: Tensor,
        quantized: Fp8Weight,
        shared_input: bool,
        deferred: DeferredGradients | None,
    ) -> Tensor:
        if shared_input:
            rowwise = quantize(x_TK, ROW_TILES, power_of_two=True)
            ctx.save_for_backward(x_TK)
        else:
            rowwise, transposed = quantize_both(x_TK, power_of_two=True)
            ctx.save_for_backward(*transposed)
        ctx.quantized, ctx.weight, ctx.deferred = quantized, weight_NK, deferred
        return quantized.product(rowwise, x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy_TN,) = grads
        held = ctx.saved_tensors
        rowwise, transposed = quantize_both(dy_TN, power_of_two=True)
        dx_TK, dw_NK = None, None

        def weight_gradient() -> Tensor:
            x = held if len(held) == 2 else quantize_both(held[0], power_of_two=True)[1]
            return fp8_gemm(*transposed, *x, b_block=ROW_TILES, dtype=torch.float32)

        if ctx.needs_input_grad[0]:
            dx_TK = ctx.quantized.input_gradient(rowwise, dy_TN.dtype)
        if ctx.needs_input_grad[1]:
            if ctx.deferred is None:
                dw_NK = weight_gradient()
            else:
                weight = ctx.weight
                ctx.deferred.add(lambda: add_gradient(weight, weight_gradient()))
        return dx_TK, dw_NK, None, None, None


def fp8_linear(
    x: Tensor,
    weight_NK: Tensor,
    quantized: Fp8Weight,
    shared_input: bool = False,
    deferred: DeferredGradients | None = None,
) -> Tensor:
    """Returns x @ weight^T in FP8, in x's dtype (FP32 or BF16, any leading axes). Differentiable in `x` and
    `weight_NK`; `quantized` is the quantization of the weight. The weight's gradient is FP32; `deferred` computes it,
    if given. `shared_input`: another operation saves x anyway."""
    shape = x.shape
    out: Tensor = _Fp8Linear.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, shape[-1]), weight_NK, quantized, shared_input, deferred
    )
    return out.view(*shape[:-1], weight_NK.shape[0])
