"""Combine: each token's sum over slots of its experts' rows, weighted by the router (DeepSeek-V3 §2.1.2, equation 12).

Notable: sums are FP32 in the order of the slots. Gradients need no atomics, because each row belongs to one slot of one
token, and that token's CTA writes it. Every run gives the same bits. On a GPU they differ from the reference's, because
a fused multiply-add rounds once.

Shapes: T tokens, K slots, R rows of a padded buffer (`kernels.permute`), E experts, D row width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.permute import PaddedOrder, accumulation_dtype, check_permutation, fill_padding, sum_slots_triton
from moray.kernels.util.arguments import FLOAT_DTYPES, check_tensor
from moray.kernels.util.backend import backend, row_offset


def _check(rows_RD: Tensor, weights_TK: Tensor, order: PaddedOrder, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor("rows_RD", rows_RD, (None, None), dtypes)
    check_tensor("weights_TK", weights_TK, order.positions_TK.shape, (accumulation_dtype(rows_RD.dtype),), like=rows_RD)
    check_permutation(order, rows_RD, len(weights_TK), len(rows_RD))


def combine_padded_reference(rows_RD: Tensor, weights_TK: Tensor, order: PaddedOrder) -> Tensor:
    """`combine_padded` in PyTorch, differentiable, also for float64."""
    _check(rows_RD, weights_TK, order, (*FLOAT_DTYPES, torch.float64))
    accum_dtype = accumulation_dtype(rows_RD.dtype)
    local_TK = order.positions_TK >= 0
    # Pairs of non-local experts read one additional row of zeros.
    places_TK = torch.where(local_TK, order.positions_TK, len(rows_RD)).long()
    dtype, zeros_1D = rows_RD.dtype, rows_RD.new_zeros((1, rows_RD.shape[1]), dtype=accum_dtype)
    rows_RD = torch.cat((rows_RD.to(accum_dtype), zeros_1D))
    weights_TK = torch.where(local_TK, weights_TK, 0.0)
    total_TD = rows_RD.new_zeros((len(weights_TK), rows_RD.shape[1]))
    for places_T, weights_T in zip(places_TK.unbind(1), weights_TK.unbind(1), strict=True):
        total_TD = total_TD + weights_T.unsqueeze(1) * rows_RD.index_select(0, places_T)
    return total_TD.to(dtype)


@triton.jit
def _combine_backward(
    grad_ptr, rows_ptr, weights_ptr, positions_ptr, offsets_ptr, counts_ptr, d_rows_ptr, d_weights_ptr, D, E,
    K: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Handles one expert's padding, or all slots of one token."""
    program = tl.program_id(0)
    if program < E:
        for first in range(0, D, WIDTH):
            columns = first + tl.arange(0, WIDTH)
            fill_padding(d_rows_ptr, offsets_ptr, counts_ptr, program, columns, D, 0, 8)
    else:
        token = program - E
        slots = tl.arange(0, SLOTS)
        at_slots = row_offset(token, K) + slots
        position = tl.load(positions_ptr + at_slots, mask=slots < K, other=-1).to(tl.int64)
        weights = tl.load(weights_ptr + at_slots, mask=slots < K, other=0.0)
        dots = tl.zeros((SLOTS, WIDTH), tl.float32)
        grad_ptr += row_offset(token, D)
        for first in range(0, D, WIDTH):
            columns = first + tl.arange(0, WIDTH)
            grad = tl.load(grad_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
            inside = (position[:, None] >= 0) & (columns[None, :] < D)
            at = position[:, None] * D + columns[None, :]
            rows = tl.load(rows_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dots += rows * grad[None, :]
            tl.store(d_rows_ptr + at, weights[:, None] * grad[None, :], mask=inside)
        # A NaN or an infinity in the gradient must not reach the weights of non-local slots.
        tl.store(d_weights_ptr + at_slots, tl.where(position >= 0, tl.sum(dots, axis=1), 0.0), mask=slots < K)


class _CombinePadded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_TK: Tensor, order: PaddedOrder) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK, order.positions_TK, order.offsets_E1, order.counts_E)
        return sum_slots_triton(rows_RD, weights_TK, order.positions_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        rows_RD, weights_TK, positions_TK, offsets_E1, counts_E = ctx.saved_tensors
        (tokens, slots), experts, width = weights_TK.shape, len(counts_E), rows_RD.shape[1]
        d_rows_RD, d_weights_TK = torch.empty_like(rows_RD), torch.empty_like(weights_TK)
        together = triton.next_power_of_2(slots)
        _combine_backward[(experts + tokens,)](
            grads[0].contiguous(), rows_RD, weights_TK, positions_TK, offsets_E1, counts_E, d_rows_RD, d_weights_TK,
            width, experts, K=slots, SLOTS=together, WIDTH=max(4096 // together, 128),
        )  # fmt: skip
        return d_rows_RD, d_weights_TK, None


def combine_padded_triton(rows_RD: Tensor, weights_TK: Tensor, order: PaddedOrder) -> Tensor:
    """`combine_padded` in one launch forward and one backward. Contiguous FP32, BF16 or FP16 rows, FP32 weights."""
    _check(rows_RD, weights_TK, order, FLOAT_DTYPES)
    out_TD: Tensor = _CombinePadded.apply(rows_RD, weights_TK, order)  # type: ignore[no-untyped-call]
    return out_TD


def combine_padded(rows_RD: Tensor, weights_TK: Tensor, order: PaddedOrder) -> Tensor:
    """out[t]: the sum over slots k, in order and in FP32, of weights[t, k] * rows[positions[t, k]].

    Returns out_TD in the rows' dtype; weights are FP32 (float64 for rows of float64). Slots of non-local experts add
    nothing, and the gradient of their weights is 0. The gradient of rows is 0 in the padding between experts. Like the
    rows themselves, it is not written from offsets_E1[-1] on. Raises ValueError if shapes, dtypes or devices do not
    match.
    """
    if backend(rows_RD) == "triton" and rows_RD.dtype != torch.float64:
        return combine_padded_triton(rows_RD.contiguous(), weights_TK.contiguous(), order)
    return combine_padded_reference(rows_RD.contiguous(), weights_TK.contiguous(), order)
