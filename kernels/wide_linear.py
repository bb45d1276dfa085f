"""A linear layer that computes in a wider dtype than its input has, as the router does.

Shapes: T rows, K inputs, N outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        return F.linear(x_TK.to(weight_NK.dtype), weight_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy_TN,), (x_TK, weight_NK) = grads, ctx.saved_tensors
        dx_TK = (dy_TN @ weight_NK).to(x_TK.dtype) if ctx.needs_input_grad[0] else None
        dw_NK = dy_TN.t() @ x_TK.to(weight_NK.dtype) if ctx.needs_input_grad[1] else None
        return dx_TK, dw_NK


def wide_linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """x @ weight^T in the weight's dtype. Differentiable. Saves x in its own dtype, as other layers may, and
    widens it again in the backward."""
    out_TN: Tensor = _WideLinear.apply(x_TK, weight_NK)  # type: ignore[no-untyped-call]
    return out_TN
