"""SwiGLU of experts over rows sorted by expert, multiplied by the router's weights w: down(silu(gate(x)) * up(x) * w).

The weights are applied before the last GEMM, which is linear. So a token's results can be summed on any rank, and the
gradient of a weight is a sum over F numbers instead of D.

Notable: the implementation loops over the experts' slices. At 8 experts of 192 x 96 and 512 rows each, one thread,
forward + backward, it takes 18.1 ms; a padded batched GEMM and a hand-written backward take the same. `unbind` matters:
if the loop indexed a stacked weight, autograd would fill a zero tensor of the whole stack per expert. An expert without
rows multiplies an empty slice, so it gets zero gradients, not None.

Shapes: R rows and their weights (of the rows' dtype or a more precise one), E experts of the group, D hidden size, F
expert hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.kernels.quantize import BLOCK, dequantize
from moray.kernels.util.deferred import DeferredGradients, deferred_linear


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


experts = experts_reference
experts_fp8 = experts_fp8_reference
