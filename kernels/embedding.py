"""Rows of a table by id, whose gradient is added to the table's in place: no table of zeros per backward.

Shapes: V rows of the table, D columns.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.kernels.util.deferred import gradient_of


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight_VD
        return F.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        (ids,) = ctx.saved_tensors
        total_VD = gradient_of(ctx.weight)
        rows = grads[0].flatten(0, -2).to(total_VD.dtype)
        total_VD.index_put_((ids.flatten(),), rows, accumulate=True)  # in a fixed order, unlike index_add_
        return None, None


def embedding(ids: Tensor, weight_VD: Tensor) -> Tensor:
    """weight[ids], of any shape of int64 ids. The weight is a leaf; the backward adds to its `.grad`, in its dtype."""
    rows: Tensor = _Embedding.apply(ids, weight_VD)  # type: ignore[no-untyped-call]
    return rows
