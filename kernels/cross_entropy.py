"""Cross entropy of a linear head, one chunk of tokens at a time.

The logits of V3's vocabulary for one 4,096-token sequence take 2.1 GB in FP32, and their gradient takes as much again.
Here a chunk's logits are freed once its loss and gradients are computed. The forward computes the gradients of the
hidden states and of the head's weight (the loss is a sum, so the incoming gradient is one factor), and the backward
scales them. Nothing is computed twice, and nothing of size [tokens, vocabulary] outlives its chunk.

Two threads, 2,048 tokens x 4,096 words, hidden 192, forward + backward, freed memory kept: 64 to 71 ms in chunks of 512
tokens, 62 to 63 in one chunk, 62 to 64 for `F.cross_entropy` over full logits. So chunks save memory, not time.

The Triton implementation holds a chunk's logits only in the input dtype, BF16 in training. One CTA per row reads them
for the maximum and the sum in FP32, then again to overwrite them with their gradient. With V3's vocabulary a chunk is
2,076 tokens.

Notable: an excluded row adds nothing and has a zero gradient, whatever its target and its logits are. In an included
row, -inf is a word of probability 0; a NaN, a +inf, or only -inf makes its loss and its whole gradient NaN.

Shapes: T tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.util.arguments import FLOAT_DTYPES, check_tensor
from moray.kernels.util.backend import backend, rounded, row_offset

# Logits of a chunk: 8 MB on the CPU (about what two cores' caches hold), 512 MB elsewhere (large products).
_CHUNK_LOGITS_CPU = 1 << 21
_CHUNK_LOGITS = 1 << 27
_CHUNK_BYTES = 1 << 29

# (hidden_CD, weight_VD, targets_C, keep_C, whether to compute gradients) -> (losses_C, their gradient by the logits)
ChunkLoss = Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


_PRODUCT = 1 << 24  # elements of a part of the weight's gradient


@dataclass(frozen=True)
class WeightGradient:
    """Where the forward adds the weight's gradient: total_VD, FP32 or FP64. scale: the gradient of the whole loss by
    the sum of cross entropies, which the caller knows in advance."""

    total_VD: Tensor
    scale: float

    def add(self, d_logits_CV: Tensor, hidden_CD: Tensor) -> None:
        """Adds a chunk's share, a part of the vocabulary at a time; products of BF16 are not rounded to it."""
        dtype, rows = self.total_VD.dtype, max(1, _PRODUCT // hidden_CD.shape[1])
        if d_logits_CV.dtype == dtype:
            self.total_VD.addmm_(d_logits_CV.t(), hidden_CD, alpha=self.scale)
            return
        for begin in range(0, len(self.total_VD), rows):
            part = slice(begin, begin + rows)
            self.total_VD[part].add_(_wide_mm(d_logits_CV[:, part].t(), hidden_CD, dtype), alpha=self.scale)


def _wide_mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if a.device.type == "cpu":  # has no product with a wider result
        return a.to(dtype) @ b.to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def _chunk_tokens(vocab: int, device: torch.device) -> int:
    budget = _CHUNK_LOGITS_CPU if device.type == "cpu" else _CHUNK_LOGITS
    return max(128, budget // vocab)


def _chunk_reference(
    hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, keep_C: Tensor, grads: bool
) -> tuple[Tensor, Tensor]:
    """Computes logits, softmax and gradient in FP32, or FP64; returns the gradient in the input dtype.

    The softmax is one fused pass. The log-sum-exp is derived from its largest probability, which is at least 1 / V, so
    the loss is exact even if the target's probability underflows in FP32.
    """
    compute_dtype = torch.float64 if hidden_CD.dtype == torch.float64 else torch.float32
    targets_C1 = torch.where(keep_C, targets_C, 0).unsqueeze(1)
    logits_CV = (hidden_CD @ weight_VD.t()).to(compute_dtype)
    picked_C1 = logits_CV.gather(1, targets_C1)
    peak_C1, place_C1 = logits_CV.max(1, keepdim=True)
    probs_CV = logits_CV.softmax(1)
    losses_C1 = peak_C1 - probs_CV.gather(1, place_C1).log() - picked_C1
    left_out_C1 = ~keep_C.unsqueeze(1)
    if grads:
        probs_CV.scatter_add_(1, targets_C1, torch.full_like(picked_C1, -1.0))
        if left_out_C1.any():
            probs_CV.masked_fill_(left_out_C1, 0.0)
    return losses_C1.masked_fill(left_out_C1, 0.0).squeeze(1), probs_CV.to(hidden_CD.dtype)


@triton.jit
def _row_loss(
    logits_ptr, target_ptr, keep_ptr, loss_ptr, V, GRADIENT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One row's loss. With GRADIENT, the row's logits are overwritten with their gradient."""
    row, columns = tl.program_id(0), tl.arange(0, WIDTH)
    row_ptr = logits_ptr + row_offset(row, V)
    target, keep = tl.load(target_ptr + row), tl.load(keep_ptr + row)
    # Read before the first pass, whose reductions synchronize all threads. In the second pass another thread may
    # have overwritten it already.
    known = keep & (target >= 0) & (target < V)
    picked = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    peak, total = -float("inf"), 0.0
    for start in range(0, V, WIDTH):
        x = tl.load(row_ptr + start + columns, mask=start + columns < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, axis=0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(x - base), axis=0)
        peak = higher
    tl.store(loss_ptr + row, tl.where(keep, tl.log(total) + peak - picked, 0.0))
    if GRADIENT:
        inverse = 1.0 / total
        for start in range(0, V, WIDTH):
            inside = start + columns < V
            x = tl.load(row_ptr + start + columns, mask=inside, other=0.0)
            gradient = tl.exp(x.to(tl.float32) - peak) * inverse - tl.where(start + columns == target, 1.0, 0.0)
            tl.store(row_ptr + start + columns, rounded(tl.where(keep, gradient, 0.0), x.dtype), mask=inside)


def _chunk_triton(
    hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, keep_C: Tensor, grads: bool
) -> tuple[Tensor, Tensor]:
    """Computes logits in the input dtype and overwrites them with their gradient."""
    logits_CV = torch.mm(hidden_CD, weight_VD.t())
    count, vocab = logits_CV.shape
    losses_C = torch.empty(count, dtype=torch.float32, device=logits_CV.device)
    # At least as wide as the number of threads: each element must have one owner, which reads it before overwriting it.
    width = min(max(triton.next_power_of_2(vocab), 1024), 4096)
    _row_loss[(count,)](
        logits_CV, targets_C, keep_C, losses_C, vocab, GRADIENT=grads, WIDTH=width, num_warps=max(width // 512, 4)
    )
    return losses_C, logits_CV


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        keep_T: Tensor,
        compute_chunk: ChunkLoss,
        chunk: int,
        grads: bool,
        into: WeightGradient | None,
        losses_T: Tensor | None,
    ) -> Tensor:
        compute_dtype = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=compute_dtype, device=hidden_TD.device)
        grad_hidden = torch.empty_like(hidden_TD) if grads else None
        grad_weight = torch.zeros_like(weight_VD, dtype=compute_dtype) if grads and into is None else None
        for start in range(0, hidden_TD.shape[0], chunk):
            part = slice(start, start + chunk)
            losses_C, d_logits_CV = compute_chunk(hidden_TD[part], weight_VD, targets_T[part], keep_T[part], grads)
            loss += losses_C.sum()
            if losses_T is not None:
                losses_T[part] = losses_C
            if grad_hidden is not None:
                torch.mm(d_logits_CV, weight_VD, out=grad_hidden[part])
                target = WeightGradient(grad_weight, 1.0) if grad_weight is not None else into
                assert target is not None
                target.add(d_logits_CV, hidden_TD[part])
            del d_logits_CV  # or two chunks' logits would be in memory at once
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = (grad_hidden * grads[0]).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grads[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *(None,) * 7


def _sum(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    keep_T: Tensor,
    compute_chunk: ChunkLoss,
    chunk: int,
    into: WeightGradient | None,
    losses_T: Tensor | None,
) -> tuple[Tensor, Tensor]:
    grads = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD, weight_VD, targets_T, keep_T, compute_chunk, chunk, grads, into, losses_T
    )
    return loss, keep_T.sum()


def cross_entropy_sum_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    keep_T: Tensor,
    chunk: int | None = None,
    into: WeightGradient | None = None,
    losses: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_sum` in PyTorch, for any dtype; the softmax is FP32, or FP64 for FP64 inputs."""
    if chunk is None:
        chunk = _chunk_tokens(weight_VD.shape[0], weight_VD.device)
    return _sum(hidden_TD, weight_VD, targets_T, keep_T, _chunk_reference, chunk, into, losses)


def cross_entropy_sum_triton(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    keep_T: Tensor,
    chunk: int | None = None,
    into: WeightGradient | None = None,
    losses: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Equals the reference up to the order of summation; an included target outside of the vocabulary gives a NaN loss.

    hidden and weight both FP32, both BF16 or both FP16, of any strides. Raises ValueError for invalid arguments.
    """
    check_tensor("weight_VD", weight_VD, (None, None), FLOAT_DTYPES, strides=(None, None))
    vocab, size = weight_VD.shape
    check_tensor("hidden_TD", hidden_TD, (None, size), (weight_VD.dtype,), like=weight_VD, strides=(None, None))
    check_tensor("targets_T", targets_T, (len(hidden_TD),), (torch.int64,), like=weight_VD)
    check_tensor("keep_T", keep_T, (len(hidden_TD),), (torch.bool,), like=weight_VD)
    if chunk is None:
        chunk = max(128, _CHUNK_BYTES // (max(vocab, 1) * weight_VD.element_size()))
    return _sum(hidden_TD, weight_VD, targets_T, keep_T, _chunk_triton, chunk, into, losses)


def cross_entropy_sum(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    keep_T: Tensor,
    chunk: int | None = None,
    into: WeightGradient | None = None,
    losses: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over the included tokens of -log softmax(hidden @ weight^T)[target].

    `targets_T` is int64, in [0, V) wherever `keep_T` (bool) is true; other targets are ignored. Returns (loss, FP32 or
    FP64 scalar; number of included tokens, int64 scalar). Differentiable once in `hidden_TD` and `weight_VD`. `chunk`:
    tokens whose logits are held at a time. `into`: the forward adds the weight's gradient there, and the backward
    computes none. `losses`: [T], receives the loss of each token, 0 for tokens that are not included.
    """
    if hidden_TD.dtype == torch.float64 or backend(hidden_TD) == "reference":
        return cross_entropy_sum_reference(hidden_TD, weight_VD, targets_T, keep_T, chunk, into, losses)
    targets_T, keep_T = targets_T.contiguous(), keep_T.contiguous()
    return cross_entropy_sum_triton(hidden_TD, weight_VD, targets_T, keep_T, chunk, into, losses)
