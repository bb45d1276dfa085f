"""The sequence-wise balance loss (DeepSeek-V3 §2.1.2, equations 17-20).

The Triton implementation reads the logits once forward and once backward, and keeps no scores. A CTA takes some tokens
of one sequence, finds the top K of each, and writes the experts' counts and sums of scores. Their sums over CTAs are
PyTorch's, so results are bit-identical in every run. Its sigmoids differ from PyTorch's in the last bits, so it may
choose other experts among scores that are that close.

Shapes: T tokens, E experts, B sequences, K slots (experts per token).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.router import TINY, best, first_of_best, rank_of, sigmoid, tokens_per_program
from moray.kernels.util.arguments import check_tensor
from moray.kernels.util.backend import backend, row_offset

_ROUNDS = 8  # groups of tokens that a CTA takes


def sequence_balance_reference(
    logits_TE: Tensor,
    top_k: int,
    sequences: int,
    counted_T: Tensor | None = None,
    weights_B: Tensor | None = None,
) -> Tensor:
    """The sequence-wise balance loss of one layer without its factor alpha (DeepSeek-V3 §2.1.2, equations 17-20).

    For each of `sequences` equal runs of tokens: the sum over experts of f (its share of the tokens' top K, times E /
    K) times P (its mean share of a token's scores). 1 is even. Only tokens of `counted_T` (bool; all by default) are
    included. Returns the sum over sequences, each times its weight, by default the number of its tokens, so that
    dividing by the sum of all weights gives the mean. Differentiable in the logits through P.

    Notable: f counts the top K of the unbiased scores, without group limit, as in the paper. The loss measures what the
    router has learned, before the bias corrects it.
    """
    tokens, experts = logits_TE.shape
    rows = (sequences, tokens // max(1, sequences))
    scores_BTE = torch.unflatten(logits_TE.sigmoid(), 0, rows)
    if counted_T is None:
        counted_T = torch.ones(tokens, dtype=torch.bool, device=logits_TE.device)
    counted_BT1 = torch.unflatten(counted_T, 0, rows).unsqueeze(-1).to(scores_BTE.dtype)
    lengths_B1 = counted_BT1.sum(1)
    weights_B1 = lengths_B1 if weights_B is None else weights_B.unsqueeze(-1).to(scores_BTE.dtype)
    with torch.no_grad():
        ids_BTK = best(scores_BTE, top_k)
        share_BE = scores_BTE.new_zeros(sequences, experts)
        share_BE.scatter_add_(1, ids_BTK.flatten(1), counted_BT1.expand_as(ids_BTK).flatten(1))
        share_BE *= experts * weights_B1 / (top_k * lengths_B1.clamp(min=1) ** 2)
    sums_BE = (scores_BTE / (scores_BTE.sum(-1, keepdim=True) + TINY) * counted_BT1).sum(1)
    return (share_BE * sums_BE).sum()


@triton.jit
def _scores(logits_ptr, counted_ptr, token, expert, inside_T, E, COUNTED: tl.constexpr):
    """Scores of tokens [TOKENS, WIDTH], zero where there is no expert; their sums' inverse; which tokens count."""
    logits = tl.load(logits_ptr + row_offset(token, E) + expert, mask=inside_T & (expert < E), other=0.0)
    scores = tl.where(expert < E, sigmoid(logits), 0.0)
    counts = inside_T
    if COUNTED:
        counts = inside_T & (tl.load(counted_ptr + token, mask=inside_T, other=0) != 0)
    return scores, tl.math.div_rn(1.0, tl.sum(scores, axis=1, keep_dims=True) + 1e-20), counts


@triton.jit
def _sums(
    logits_ptr, counted_ptr, counts_ptr, sums_ptr, length, E, parts,
    K: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Counts and sums of ROUNDS * TOKENS tokens of one sequence."""
    part, sequence = tl.program_id(0), tl.program_id(1)
    expert = tl.arange(0, WIDTH)[None, :]
    counts = tl.zeros((WIDTH,), tl.int32)
    sums = tl.zeros((WIDTH,), tl.float32)
    for turn in range(ROUNDS):
        within = (part * ROUNDS + turn) * TOKENS + tl.arange(0, TOKENS)[:, None]
        token = row_offset(sequence, length) + within
        scores, inverse, counted = _scores(logits_ptr, counted_ptr, token, expert, within < length, E, COUNTED)
        rank = tl.where(expert < E, rank_of(scores), -0x80000000)
        for _ in tl.static_range(K):
            chosen = expert == first_of_best(rank, expert, 1)
            counts += tl.sum((chosen & counted).to(tl.int32), axis=0)
            rank = tl.where(chosen, -0x80000000, rank)
        sums += tl.sum(tl.where(counted, scores * inverse, 0.0), axis=0)
    at = row_offset(row_offset(sequence, parts) + part, E) + tl.arange(0, WIDTH)
    tl.store(counts_ptr + at, counts, mask=tl.arange(0, WIDTH) < E)
    tl.store(sums_ptr + at, sums, mask=tl.arange(0, WIDTH) < E)


@triton.jit
def _gradient(
    grad_ptr, logits_ptr, counted_ptr, share_ptr, d_logits_ptr, length, E,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Of the logits of TOKENS tokens. The loss is linear in scores over their sum; share holds its factors."""
    part, sequence = tl.program_id(0), tl.program_id(1)
    expert = tl.arange(0, WIDTH)[None, :]
    within = part * TOKENS + tl.arange(0, TOKENS)[:, None]
    token = row_offset(sequence, length) + within
    scores, inverse, counted = _scores(logits_ptr, counted_ptr, token, expert, within < length, E, COUNTED)
    share = tl.load(share_ptr + row_offset(sequence, E) + expert, mask=expert < E, other=0.0)
    mean = tl.sum(share * scores * inverse, axis=1, keep_dims=True)
    slope = tl.load(grad_ptr) * (share - mean) * inverse * scores * (1.0 - scores)
    inside = (within < length) & (expert < E)
    tl.store(d_logits_ptr + row_offset(token, E) + expert, tl.where(counted, slope, 0.0), mask=inside)


class _SequenceBalance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, top_k: int, sequences: int, counted_T: Tensor | None, weights_B: Tensor | None
    ) -> Tensor:
        tokens, experts = logits_TE.shape
        length, device = tokens // max(1, sequences), logits_TE.device
        width = triton.next_power_of_2(experts)
        together = max(1, tokens_per_program(width) // 2)  # more spill registers
        parts = triton.cdiv(length, together * _ROUNDS)
        counts_BNE = torch.empty((sequences, parts, experts), dtype=torch.int32, device=device)
        sums_BNE = torch.empty((sequences, parts, experts), dtype=torch.float32, device=device)
        marks_T = logits_TE if counted_T is None else counted_T
        if counts_BNE.numel():
            _sums[(parts, sequences)](
                logits_TE, marks_T, counts_BNE, sums_BNE, length, experts, parts,
                K=top_k, TOKENS=together, WIDTH=width, ROUNDS=_ROUNDS, COUNTED=counted_T is not None,
            )  # fmt: skip
        if counted_T is None:
            lengths_B = torch.full((sequences,), float(length), device=device)
        else:
            lengths_B = counted_T.view(sequences, length).sum(1).float()
        factors_B = (lengths_B if weights_B is None else weights_B.float()) / lengths_B.clamp(min=1) ** 2
        share_BE = counts_BNE.sum(1) * (experts / top_k * factors_B).unsqueeze(1)
        ctx.save_for_backward(logits_TE, marks_T, share_BE)
        ctx.sequences, ctx.counted = sequences, counted_T is not None
        return (share_BE * sums_BNE.sum(1)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        logits_TE, marks_T, share_BE = ctx.saved_tensors
        tokens, experts = logits_TE.shape
        d_logits_TE = torch.empty_like(logits_TE)
        width = triton.next_power_of_2(experts)
        together = tokens_per_program(width)
        if tokens:
            length = tokens // ctx.sequences
            _gradient[(triton.cdiv(length, together), ctx.sequences)](
                grads[0].contiguous(), logits_TE, marks_T, share_BE, d_logits_TE, length, experts,
                TOKENS=together, WIDTH=width, COUNTED=ctx.counted,
            )  # fmt: skip
        return d_logits_TE, None, None, None, None


def sequence_balance_triton(
    logits_TE: Tensor,
    top_k: int,
    sequences: int,
    counted_T: Tensor | None = None,
    weights_B: Tensor | None = None,
) -> Tensor:
    """`sequence_balance_reference` for contiguous FP32 logits, in one launch forward and one backward."""
    check_tensor("logits_TE", logits_TE, (None, None), (torch.float32,))
    if counted_T is not None:
        check_tensor("counted_T", counted_T, (len(logits_TE),), (torch.bool,), like=logits_TE)
    loss: Tensor = _SequenceBalance.apply(  # type: ignore[no-untyped-call]
        logits_TE, top_k, sequences, counted_T, weights_B
    )
    return loss


def sequence_balance(
    logits_TE: Tensor,
    top_k: int,
    sequences: int,
    counted_T: Tensor | None = None,
    weights_B: Tensor | None = None,
) -> Tensor:
    """`sequence_balance_reference`; float64 logits use it on every device."""
    if backend(logits_TE) == "triton" and logits_TE.dtype != torch.float64:
        counted_T = None if counted_T is None else counted_T.contiguous()
        return sequence_balance_triton(logits_TE.contiguous(), top_k, sequences, counted_T, weights_B)
    return sequence_balance_reference(logits_TE, top_k, sequences, counted_T, weights_B)
