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

from collections.abc import Sequence
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


@dataclass
class Fp8Weight:
    """A quantized weight: E4M3 numbers [..., N, K] and power-of-two scales of blocks of 128 x 128.

    A backward keeps this object, not its tensors. So they may be cleared between forward and backward, if they are
    filled again with the same quantization. keep_transpose: the first backward's transposed form serves all later ones.
    """

    fp8: Tensor
    scales: Tensor
    keep_transpose: bool = True

    def clear(self) -> None:
        """Frees the tensors."""
        self.__dict__.clear()

    def fill(self, other: "Fp8Weight") -> None:
        """Takes the tensors of another quantization."""
        self.__dict__ |= other.__dict__

    @property
    def transposed(self) -> Quantized:
        """The transposed quantization, for the input's gradient on tensor cores, which require the summed axis last."""
        return self._kept_transpose if self.keep_transpose else self._transpose()

    @cached_property
    def _kept_transpose(self) -> Quantized:
        return self._transpose()

    def _transpose(self) -> Quantized:
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


def fp8_weight(weight: Tensor, keep_transpose: bool = True) -> Fp8Weight:
    """Quantizes a weight, or a stack of weights. The result is valid until it changes."""
    return Fp8Weight(*quantize(weight.detach(), WEIGHT_BLOCKS, power_of_two=True), keep_transpose)


class _Fp8Linears(torch.autograd.Function):
    """Several linear layers of one input, which is quantized and saved once."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        quantized: Sequence[Fp8Weight],
        shared_input: bool,
        deferred: DeferredGradients | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        if shared_input:
            rowwise = quantize(x_TK, ROW_TILES, power_of_two=True)
            ctx.save_for_backward(x_TK)
        else:
            rowwise, transposed = quantize_both(x_TK, power_of_two=True)
            ctx.save_for_backward(*transposed)
        ctx.quantized, ctx.weights, ctx.deferred = quantized, weights, deferred
        return tuple(each.product(rowwise, x_TK.dtype) for each in quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        held = ctx.saved_tensors
        dx_TK, gradients = None, []
        for dy_TN, quantized, weight in zip(grads, ctx.quantized, ctx.weights, strict=True):
            rowwise, transposed = quantize_both(dy_TN, power_of_two=True)
            if ctx.needs_input_grad[0]:
                dx = quantized.input_gradient(rowwise, dy_TN.dtype)
                dx_TK = dx if dx_TK is None else dx_TK + dx
            gradients.append(_gradient_of(weight, transposed, held, ctx.deferred) if weight.requires_grad else None)
        return dx_TK, None, None, None, *gradients


def _gradient_of(
    weight: Tensor, dy: Quantized, held: Sequence[Tensor], deferred: DeferredGradients | None
) -> Tensor | None:
    """The gradient of a weight, or None if it is deferred. held: the saved input, quantized or not."""

    def gradient() -> Tensor:
        x = held if len(held) == 2 else quantize_both(held[0], power_of_two=True)[1]
        return fp8_gemm(*dy, *x, b_block=ROW_TILES, dtype=torch.float32)

    if deferred is None:
        return gradient()
    deferred.add(lambda: add_gradient(weight, gradient()))
    return None


def fp8_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    quantized: Sequence[Fp8Weight],
    shared_input: bool = False,
    deferred: DeferredGradients | None = None,
) -> tuple[Tensor, ...]:
    """Returns x @ weight^T in FP8 for each weight [N, K], in x's dtype (FP32 or BF16, any leading axes). Differentiable
    in `x` and the weights; `quantized` are the quantizations of the weights. The gradients of weights are FP32;
    `deferred` computes them, if given. `shared_input`: another operation saves x anyway."""
    shape = x.shape
    outs: tuple[Tensor, ...] = _Fp8Linears.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, shape[-1]), quantized, shared_input, deferred, *weights
    )
    return tuple(out.view(*shape[:-1], out.shape[-1]) for out in outs)


def fp8_linear(
    x: Tensor,
    weight_NK: Tensor,
    quantized: Fp8Weight,
    shared_input: bool = False,
    deferred: DeferredGradients | None = None,
) -> Tensor:
    """`fp8_linears` of one weight."""
    return fp8_linears(x, [weight_NK], [quantized], shared_input, deferred)[0]
