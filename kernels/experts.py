"""SwiGLU of experts over rows sorted by expert, multiplied by the router's weights w: down(silu(gate(x)) * up(x) * w).

The weights are applied before the last GEMM, which is linear. So a token's results can be summed on any rank, and the
gradient of a weight is a sum over F numbers instead of D.

On GPUs, BF16 rows take one grouped GEMM per projection (`torch.nn.functional.grouped_mm`), whose row counts stay on the
device.

Notable: the reference loops over the experts' slices. At 8 experts of 192 x 96 and 512 rows each, one thread,
forward + backward, it takes 18.1 ms; a padded batched GEMM and a hand-written backward take the same. `unbind` matters:
if the loop indexed a stacked weight, autograd would fill a zero tensor of the whole stack per expert. An expert without
rows multiplies an empty slice, so it gets zero gradients, not None.

Shapes: R rows and their weights (of the rows' dtype or a more precise one), E experts of the group, D hidden size, F
expert hidden size, K inputs, N outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.kernels.quantize import BLOCK, dequantize
from moray.kernels.util.backend import backend
from moray.kernels.util.deferred import DeferredGradients, add_gradient, deferred_linear

_ALIGNED = 8  # grouped_mm requires rows of a multiple of 16 bytes


def _product(gate_RF: Tensor, up_RF: Tensor, weights_R: Tensor) -> Tensor:
    return (F.silu(gate_RF) * up_RF * weights_R.unsqueeze(1)).to(gate_RF.dtype)


def experts_reference(
    rows_RD: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_gate_EFD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
) -> Tensor:
    """Applies expert e to its `counts_E[e]` consecutive rows; returns rows in the same order.

    `counts_E` (int64, on any device) must sum to R.
    """
    counts = counts_E.tolist()
    stacks = zip(w_gate_EFD.unbind(0), w_up_EFD.unbind(0), w_down_EDF.unbind(0), strict=True)
    outputs = [
        F.linear(_product(F.linear(x, gate), F.linear(x, up), w), down)
        for x, w, (gate, up, down) in zip(
            torch.split(rows_RD, counts), torch.split(weights_R, counts), stacks, strict=True
        )
    ]
    return torch.cat(outputs)


def experts_deferred(
    rows_RD: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_gate_EFD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    deferred: DeferredGradients,
) -> Tensor:
    """`experts_reference` in the rows' dtype. The weights are leaves of any dtype; `deferred` computes their
    gradients."""
    counts, outputs = counts_E.tolist(), []
    for e, (x, w) in enumerate(zip(torch.split(rows_RD, counts), torch.split(weights_R, counts), strict=True)):
        gate, up = (deferred_linear(x, stack, deferred, e) for stack in (w_gate_EFD, w_up_EFD))
        outputs.append(deferred_linear(_product(gate, up, w), w_down_EDF, deferred, e))
    return torch.cat(outputs)


def experts_fp8_reference(
    rows_RD: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    gate: tuple[Tensor, Tensor],
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
) -> Tensor:
    """`experts_reference` with FP8 weights, each given as (stack, its scales of 128 x 128 blocks); inference only.

    Dequantizes an expert's weights just before they are used, and only if the expert has rows.
    """
    out_RD = torch.empty_like(rows_RD)
    begin = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            part = slice(begin, begin + count)
            w_gate, w_up, w_down = (
                dequantize(stack[expert], scales[expert], (BLOCK, BLOCK), rows_RD.dtype)
                for stack, scales in (gate, up, down)
            )
            x = rows_RD[part]
            inner = _product(F.linear(x, w_gate), F.linear(x, w_up), weights_R[part])
            out_RD[part] = F.linear(inner, w_down)
            begin += count
    return out_RD


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RK: Tensor, stack_ENK: Tensor, counts_E: Tensor, ends_E: Tensor, deferred: DeferredGradients | None
    ) -> Tensor:
        ctx.save_for_backward(x_RK, counts_E, ends_E)
        ctx.stack, ctx.deferred = stack_ENK, deferred
        return F.grouped_mm(x_RK, stack_ENK.to(x_RK.dtype).transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_RK, counts_E, ends_E = ctx.saved_tensors
        dy_RN, stack = grads[0].contiguous(), ctx.stack

        def gradient() -> Tensor:
            d_stack_ENK = F.grouped_mm(dy_RN.t(), x_RK, offs=ends_E)
            return d_stack_ENK.masked_fill_((counts_E == 0)[:, None, None], 0)  # of an expert without rows: undefined

        dx_RK = F.grouped_mm(dy_RN, stack.detach().to(dy_RN.dtype), offs=ends_E) if ctx.needs_input_grad[0] else None
        if ctx.deferred is None:
            return dx_RK, gradient(), None, None, None
        ctx.deferred.add(lambda: add_gradient(stack, gradient()))
        return dx_RK, None, None, None, None


def experts_grouped(
    rows_RD: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_gate_EFD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    deferred: DeferredGradients | None = None,
) -> Tensor:
    """`experts_reference` for BF16 rows and weights of any dtype, whose gradients `deferred` computes if given. D and F
    are multiples of 8. Does not synchronize with a device."""
    counts_E = counts_E.to(rows_RD.device, non_blocking=True)
    ends_E = counts_E.cumsum(0).int()
    rows = len(rows_RD)
    if not rows:  # grouped_mm requires a row
        rows_RD, weights_R = F.pad(rows_RD, (0, 0, 0, 1)), F.pad(weights_R, (0, 1))

    def product(x_RK: Tensor, stack_ENK: Tensor) -> Tensor:
        out_RN: Tensor = _GroupedLinear.apply(x_RK, stack_ENK, counts_E, ends_E, deferred)  # type: ignore[no-untyped-call]
        return out_RN

    inner_RF = _product(product(rows_RD, w_gate_EFD), product(rows_RD, w_up_EFD), weights_R)
    return product(inner_RF, w_down_EDF)[:rows]


def experts(
    rows_RD: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_gate_EFD: Tensor,
    w_up_EFD: Tensor,
    w_down_EDF: Tensor,
    deferred: DeferredGradients | None = None,
) -> Tensor:
    """`experts_reference` in the rows' dtype, for weights of any dtype. If `deferred` is given, it computes their
    gradients, and they must be leaves."""
    stacks = (w_gate_EFD, w_up_EFD, w_down_EDF)
    aligned = not any(size % _ALIGNED for size in w_gate_EFD.shape[1:])
    if rows_RD.dtype == torch.bfloat16 and aligned and backend(rows_RD) == "triton":
        return experts_grouped(rows_RD, weights_R, counts_E, *stacks, deferred)
    if deferred is not None:
        return experts_deferred(rows_RD, weights_R, counts_E, *stacks, deferred)
    return experts_reference(rows_RD, weights_R, counts_E, *(stack.to(rows_RD.dtype) for stack in stacks))


experts_fp8 = experts_fp8_reference
