"""SwiGLU of a group of experts in FP8, forward and backward, over rows sorted by expert and padded.

    h = Q(x) Q([gate; up])^T      inner = silu(h_gate) * h_up * w      y = Q(inner) Q(down)^T

Each expert's rows begin at a multiple of 128, so no tile along the tokens holds rows of two experts. The padding is
zeros. Offsets stay on the device. Gate and up are one GEMM, forward and backward, over stacked weights. w are the
router's weights, one per row. A dense MLP is one expert without them.

The backward saves the input, gate and up in FP8: D + 2F bytes per row. Rows and gradients that come in FP8
(`kernels/fp8_rows.py`) are multiplied as they are; others are quantized in both layouts in one pass. Besides, only six
grouped GEMMs and two fused SwiGLUs (`kernels/swiglu.py`) read or write the rows. The GEMMs of weight gradients multiply
FP8, or the same numbers in BF16 where that is faster (`kernels/tuning.py`).

Shapes: R padded rows, E experts, D hidden size, F expert hidden size, G = F rounded up to 128; the added columns are
zero in every quantized tensor.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.kernels.fp8_gemm import fp8_gemm_grouped_triton, fp8_gemm_k_grouped
from moray.kernels.fp8_linear import Fp8Weight, Quantized, fp8_weight
from moray.kernels.fp8_rows import Fp8Rows, transpose_fp8
from moray.kernels.quantize import BLOCK, dequantize, quantize_both
from moray.kernels.swiglu import swiglu_backward, swiglu_quantize
from moray.kernels.tuning import weight_gradients_in_bf16
from moray.kernels.util.backend import backend
from moray.kernels.util.deferred import DeferredGradients, add_gradient


@dataclass(frozen=True)
class Fp8Experts:
    """Quantized weights of a group of experts: gate_up [E, 2G, D] and down [E, D, G]."""

    gate_up: Fp8Weight
    down: Fp8Weight

    def clear(self) -> None:
        """Frees the tensors."""
        self.gate_up.clear()
        self.down.clear()

    def fill(self, other: "Fp8Experts") -> None:
        """Takes the tensors of another quantization."""
        self.gate_up.fill(other.gate_up)
        self.down.fill(other.down)


def fp8_expert_weights(
    w_gate_EFD: Tensor, w_up_EFD: Tensor, w_down_EDF: Tensor, keep_transpose: bool = True
) -> Fp8Experts:
    """Quantizes the weights of a group of experts. The result is valid until they change."""
    more = -w_gate_EFD.shape[1] % BLOCK
    gate, up = (F.pad(w.detach(), (0, 0, 0, more)) for w in (w_gate_EFD, w_up_EFD))
    gate_up = fp8_weight(torch.cat((gate, up), dim=1), keep_transpose)
    return Fp8Experts(gate_up, fp8_weight(F.pad(w_down_EDF.detach(), (0, more)), keep_transpose))


def _grouped(x: Quantized, weight: Fp8Weight, offsets_E1: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies each expert's rows by its transposed weight."""
    if backend(x[0]) == "triton":
        return fp8_gemm_grouped_triton(*x, weight.fp8, weight.scales, offsets_E1, dtype=dtype)
    return _grouped_on_cpu(x, weight.dequantized.transpose(1, 2), offsets_E1, dtype)


def _grouped_input_gradient(dy: Quantized, weight: Fp8Weight, offsets_E1: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies each expert's rows by its weight."""
    if backend(dy[0]) == "triton":
        return fp8_gemm_grouped_triton(*dy, *weight.transposed, offsets_E1, dtype=dtype)
    return _grouped_on_cpu(dy, weight.dequantized, offsets_E1, dtype)


def _grouped_on_cpu(x: Quantized, factors_EKN: Tensor, offsets_E1: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies dequantized numbers, on the CPU."""
    x_RK = dequantize(*x, dtype=dtype)
    out_RN = x_RK.new_zeros((x_RK.shape[0], factors_EKN.shape[2]))
    edges = offsets_E1.tolist()
    for expert, factor_KN in enumerate(factors_EKN.unbind(0)):
        part = slice(edges[expert], edges[expert + 1])
        out_RN[part] = x_RK[part] @ factor_KN.to(dtype)
    return out_RN


class Factor(NamedTuple):
    """A factor of a weight's gradient, which is summed over rows: quantized rows [R, K], or their transpose [K, R]."""

    fp8: Tensor
    scales: Tensor
    is_transposed: bool

    def transposed(self) -> Quantized:
        """The transpose, quantized along the rows."""
        return (self.fp8, self.scales) if self.is_transposed else transpose_fp8(self.fp8, self.scales)

    def wide(self) -> Tensor:
        """The rows in BF16, [R, K], of any strides."""
        numbers = dequantize(self.fp8, self.scales, dtype=torch.bfloat16)
        return numbers.t() if self.is_transposed else numbers


def stack_gradient_fp8(dy: Factor, x: Factor, offsets_E1: Tensor) -> Tensor:
    """Sums of dy^T x over the rows of each expert: FP32 [E, N, K]. dy [R, N], x [R, K]."""
    return fp8_gemm_k_grouped(*dy.transposed(), *x.transposed(), offsets_E1)


def stack_gradient_bf16(dy: Factor, x: Factor, offsets_E1: Tensor) -> Tensor:
    """`stack_gradient_fp8` of the same numbers in BF16: FP32 sums, rounded to BF16."""
    d_w_ENK = F.grouped_mm(dy.wide().t(), x.wide(), offs=offsets_E1[1:])
    return d_w_ENK.masked_fill_((offsets_E1.diff() == 0)[:, None, None], 0)  # of an expert without rows: undefined


def _stack_gradient(dy: Factor, x: Factor, offsets_E1: Tensor) -> Tensor:
    if backend(x.fp8) == "triton" and weight_gradients_in_bf16(x.fp8.device):
        return stack_gradient_bf16(dy, x, offsets_E1)
    return stack_gradient_fp8(dy, x, offsets_E1)


def _layouts(x_RD: Tensor) -> tuple[Quantized, Factor]:
    """The quantized rows, and the factor of a weight's gradient."""
    if isinstance(x_RD, Fp8Rows):
        return (x_RD.fp8, x_RD.scales), Factor(x_RD.fp8, x_RD.scales, is_transposed=False)
    rowwise, transposed = quantize_both(x_RD, power_of_two=True)
    return rowwise, Factor(*transposed, is_transposed=True)


class _Fp8Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weights_R: Tensor | None,
        offsets_E1: Tensor,
        quantized: Fp8Experts,
        deferred: DeferredGradients | None,
        *stacks: Tensor,
    ) -> Tensor:
        rowwise, x = _layouts(x_RD)
        h_RH = _grouped(rowwise, quantized.gate_up, offsets_E1, x_RD.dtype)
        inner, gate_up = swiglu_quantize(h_RH, weights_R)
        ctx.save_for_backward(x.fp8, x.scales, *gate_up, offsets_E1, weights_R)
        ctx.quantized, ctx.deferred, ctx.stacks, ctx.x_is_transposed = quantized, deferred, stacks, x.is_transposed
        return _grouped(inner, quantized.down, offsets_E1, x_RD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy_RD,) = grads
        x_fp8, x_scales, gate_up_fp8, gate_up_scales, offsets_E1, weights_R = ctx.saved_tensors
        x = Factor(x_fp8, x_scales, ctx.x_is_transposed)
        rowwise, dy = _layouts(dy_RD)
        d_inner_RG = _grouped_input_gradient(rowwise, ctx.quantized.down, offsets_E1, dy_RD.dtype)
        d = swiglu_backward((gate_up_fp8, gate_up_scales), d_inner_RG, weights_R)
        dx_RD = _grouped_input_gradient(d.rowwise, ctx.quantized.gate_up, offsets_E1, dy_RD.dtype)
        stacks = ctx.stacks

        def stack_gradients() -> tuple[Tensor, ...]:
            inner = stacks[0].shape[-2]
            d_gate_up_EHD = _stack_gradient(Factor(*d.transposed, is_transposed=True), x, offsets_E1)
            d_gate, d_up = (half[:, :inner] for half in d_gate_up_EHD.chunk(2, dim=1))
            d_down = _stack_gradient(dy, Factor(*d.inner, is_transposed=True), offsets_E1)[..., :inner]
            shapes = (stack.shape for stack in stacks)
            return tuple(d_w.reshape(shape) for d_w, shape in zip((d_gate, d_up, d_down), shapes, strict=True))

        if not any(ctx.needs_input_grad[5:]):
            return dx_RD, d.weights_R, None, None, None, None, None, None
        if ctx.deferred is None:
            return dx_RD, d.weights_R, None, None, None, *stack_gradients()

        def compute() -> None:
            for stack, gradient in zip(stacks, stack_gradients(), strict=True):
                add_gradient(stack, gradient)

        ctx.deferred.add(compute)
        return dx_RD, d.weights_R, None, None, None, None, None, None


def fp8_experts(
    x_RD: Tensor,
    weights_R: Tensor | None,
    offsets_E1: Tensor,
    quantized: Fp8Experts,
    w_gate_EFD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    deferred: DeferredGradients | None = None,
) -> Tensor:
    """Applies expert e to rows [offsets_e, offsets_e+1), in x's dtype (FP32 or BF16). Rows from the last offset on, and
    their gradient, are undefined. x, and the gradient of the result, may be `Fp8Rows`.

    R and the offsets (int32) are multiples of 128; weights_R is FP32. Differentiable in x, weights_R and the stacks;
    `quantized` is the quantization of the stacks. Their gradients are FP32 sums. If `deferred` is given, it computes
    them, and the stacks must be leaves.
    """
    out: Tensor = _Fp8Experts.apply(  # type: ignore[no-untyped-call]
        x_RD, weights_R, offsets_E1, quantized, deferred, w_gate_EFD, w_up_EFD, w_down_EDF
    )
    return out


def fp8_mlp(
    x_TD: Tensor,
    quantized: Fp8Experts,
    w_gate_FD: Tensor,
    w_up_FD: Tensor,
    w_down_DF: Tensor,
    deferred: DeferredGradients | None = None,
) -> Tensor:
    """Applies one expert to any number of rows. `quantized` is the quantization of a stack of one expert."""
    rows = x_TD.shape[0]
    padded_RD = F.pad(x_TD, (0, 0, 0, -rows % BLOCK))
    offsets_E1 = torch.arange(2, dtype=torch.int32, device=x_TD.device) * padded_RD.shape[0]
    return fp8_experts(padded_RD, None, offsets_E1, quantized, w_gate_FD, w_up_FD, w_down_DF, deferred)[:rows]
