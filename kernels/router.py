"""Sigmoid routing with a selection bias and a group limit (DeepSeek-V3 §2.1.2, equations 12-16).

Scores are sigmoids of the logits. The bias affects only the *selection*; the weights that multiply the experts' outputs
come from the unbiased scores. With a group limit, the `topk_group` of `n_group` groups whose two best biased scores
have the highest sum are kept, and the top K experts are selected among theirs.

Notable: selection uses a stable sort, so the lower expert id wins among equal scores, on every device. `torch.topk`
guarantees no order among equal values, and saturated FP32 sigmoids do collide.

The Triton kernel routes in one launch. A CTA holds the scores of a few tokens, as integers with the same order as the
scores, and takes the maximum K times. Its sigmoids differ from PyTorch's in the last bits, so it may choose other
experts among scores that are that close. Equal logits under an equal bias are equal in both. Counts are summed by
integer atomics, whose result does not depend on their order.

A NaN ranks above all numbers in both implementations, as in torch.sort. So a token is routed first to experts with
NaN logits, with the weight NaN (with normalization, all of the token's weights are NaN), and the NaN shows in the loss.

Shapes: T tokens, E experts, G groups, K slots (experts per token).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moray.kernels.util.arguments import check_tensor
from moray.kernels.util.backend import backend, contiguous_blocks, row_offset

# Keeps the normalization finite when every chosen score underflows to zero.
TINY = 1e-20


def best(scores_XE: Tensor, k: int) -> Tensor:
    """The columns of the k largest scores, the lower one first among equal ones."""
    return torch.sort(scores_XE, dim=-1, descending=True, stable=True).indices[..., :k]


def _outside_best_groups(choice_TE: Tensor, n_group: int, topk_group: int) -> Tensor:
    """True where an expert's group is not among the token's best `topk_group` groups."""
    grouped_TGX = torch.unflatten(choice_TE, -1, (n_group, -1))
    group_score_TG = grouped_TGX.topk(2, dim=-1).values.sum(-1)
    dropped_TG = torch.ones_like(group_score_TG, dtype=torch.bool)
    dropped_TG.scatter_(-1, best(group_score_TG, topk_group), False)
    return dropped_TG.unsqueeze(-1).expand_as(grouped_TGX).flatten(-2)


def route_reference(
    logits_TE: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses `top_k` experts per token.

    Returns (ids_TK int64, best biased score first; weights_TK in the logits' dtype, differentiable; counts_E int64, the
    number of (token, slot) pairs of each expert, summing to T * K). Groups have at least two experts.
    """
    with torch.no_grad():
        choice_TE = logits_TE.sigmoid() + bias_E
        if topk_group < n_group:
            # -inf and not 0: a bias may make the scores of kept experts negative.
            choice_TE.masked_fill_(_outside_best_groups(choice_TE, n_group, topk_group), float("-inf"))
        ids_TK = best(choice_TE, top_k)
    return ids_TK, *weigh(logits_TE, ids_TK, normalise=normalise, scale=scale)


def weigh(logits_TE: Tensor, ids_TK: Tensor, *, normalise: bool = True, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the differentiable weights of already chosen experts, and counts_E, the number of pairs of each
    expert."""
    weights_TK = logits_TE.sigmoid().gather(-1, ids_TK)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + TINY)
    flat = ids_TK.flatten()
    counts_E = torch.zeros(logits_TE.shape[-1], dtype=torch.int64, device=flat.device)
    counts_E.scatter_add_(0, flat, torch.ones_like(flat))
    return weights_TK * scale, counts_E


def _check(logits_TE: Tensor, bias_E: Tensor, top_k: int, n_group: int, topk_group: int) -> None:
    check_tensor("logits_TE", logits_TE, (None, None), (torch.float32,))
    experts = logits_TE.shape[1]
    check_tensor("bias_E", bias_E, (experts,), (torch.float32,), like=logits_TE)
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k = {top_k}, expected 1 to {experts} (the experts)")
    if n_group < 1 or experts % n_group:
        raise ValueError(f"n_group = {n_group}, expected a divisor of {experts} (the experts)")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"topk_group = {topk_group}, expected 1 to {n_group} (n_group)")
    if topk_group < n_group and experts < 2 * n_group:
        raise ValueError(f"n_group = {n_group}, expected at least two of {experts} experts per group")


@triton.jit
def sigmoid(x):
    return tl.math.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def rank_of(x):
    """Maps FP32 numbers to int32 with the same order, NaN above all. The minimum is -2139095041, for -infinity."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _number(rank):
    """Inverse of `rank_of`."""
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_of_best(rank, index, AXIS: tl.constexpr):
    """Returns the lowest index with the highest rank along an axis; the axis is kept."""
    best = tl.max(rank, axis=AXIS, keep_dims=True)
    return tl.min(tl.where(rank == best, index, 0x7FFFFFFF), axis=AXIS, keep_dims=True)


@triton.jit
def _limit_groups(
    rank, TOKENS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, G: tl.constexpr, X: tl.constexpr
):
    """Sets the ranks [TOKENS, G * X] of dropped groups to -infinity's. Columns that are no expert keep the lowest
    rank."""
    NOTHING: tl.constexpr = -0x80000000
    cube = tl.reshape(rank, (TOKENS, G, X))
    within, group = tl.arange(0, X)[None, None, :], tl.arange(0, G)[None, :, None]
    best = _number(tl.max(cube, axis=2, keep_dims=True))
    others = tl.where(within == first_of_best(cube, within, 2), NOTHING, cube)
    rest = tl.where(group < GROUPS, rank_of(best + _number(tl.max(others, axis=2, keep_dims=True))), NOTHING)
    for _ in tl.static_range(KEPT):
        rest = tl.where(group == first_of_best(rest, group, 1), NOTHING, rest)
    limited = tl.where((rest == NOTHING) | (cube == NOTHING), cube, -2139095041)
    return tl.reshape(limited, (TOKENS, G * X))


@triton.jit
def _route(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, counts_ptr, T, E, scale,
    TOKENS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, MEMBERS: tl.constexpr,
    G: tl.constexpr, X: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Routes TOKENS tokens. Columns are G groups of X, both powers of two; GROUPS groups of MEMBERS columns are
    experts."""
    NOTHING: tl.constexpr = -0x80000000
    column = tl.arange(0, G * X)[None, :]
    is_expert = (column // X < GROUPS) & (column % X < MEMBERS)
    expert = column // X * MEMBERS + column % X
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    at = logits_ptr + row_offset(token, E) + expert
    scores = sigmoid(tl.load(at, mask=(token < T) & is_expert, other=0.0))
    rank = rank_of(scores + tl.load(bias_ptr + expert, mask=is_expert, other=0.0))
    rank = tl.where(is_expert, rank, NOTHING)
    if KEPT < GROUPS:
        rank = _limit_groups(rank, TOKENS, GROUPS, KEPT, G, X)
    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((TOKENS, SLOTS), tl.int32)
    weights = tl.zeros((TOKENS, SLOTS), tl.float32)
    for k in tl.static_range(K):
        best = first_of_best(rank, column, 1)
        score = tl.sum(tl.where(column == best, scores, 0.0), axis=1, keep_dims=True)
        chosen = tl.where(slot == k, best, chosen)
        weights = tl.where(slot == k, score, weights)
        rank = tl.where(column == best, NOTHING, rank)
    if NORMALISE:
        weights = tl.math.div_rn(weights, tl.sum(weights, axis=1, keep_dims=True) + 1e-20)
    ids = chosen // X * MEMBERS + chosen % X
    inside = (token < T) & (slot < K)
    tl.store(ids_ptr + row_offset(token, K) + slot, ids, mask=inside)
    tl.store(weights_ptr + row_offset(token, K) + slot, weights * scale, mask=inside)
    tl.atomic_add(counts_ptr + ids, 1, mask=inside, sem="relaxed")


@triton.jit
def _route_backward(
    grad_ptr, logits_ptr, ids_ptr, d_logits_ptr, T, E, scale,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Handles TOKENS tokens. Weight k is scale * s_k / n with n = sum of s + 1e-20, and n depends on each chosen score
    s."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert, slot = tl.arange(0, WIDTH)[None, :], tl.arange(0, SLOTS)[None, :]
    inverse = tl.full((TOKENS, 1), 1.0, tl.float32)
    mean = tl.zeros((TOKENS, 1), tl.float32)
    if NORMALISE:
        inside = (token < T) & (slot < K)
        ids = tl.load(ids_ptr + row_offset(token, K) + slot, mask=inside, other=0)
        logits = tl.load(logits_ptr + row_offset(token, E) + ids, mask=inside, other=0.0)
        grads = tl.load(grad_ptr + row_offset(token, K) + slot, mask=inside, other=0.0)
        scores = tl.where(inside, sigmoid(logits), 0.0)
        inverse = tl.math.div_rn(1.0, tl.sum(scores, axis=1, keep_dims=True) + 1e-20)
        mean = tl.sum(grads * (scores * inverse), axis=1, keep_dims=True)
    d_logits = tl.zeros((TOKENS, WIDTH), tl.float32)
    for k in tl.static_range(K):
        id_of_slot = tl.load(ids_ptr + row_offset(token, K) + k, mask=token < T, other=0)
        score = sigmoid(tl.load(logits_ptr + row_offset(token, E) + id_of_slot, mask=token < T, other=0.0))
        grad = tl.load(grad_ptr + row_offset(token, K) + k, mask=token < T, other=0.0)
        slope = scale * (grad - mean) * inverse * (score * (1.0 - score))
        d_logits = tl.where(expert == id_of_slot, slope, d_logits)
    tl.store(d_logits_ptr + row_offset(token, E) + expert, d_logits, mask=(token < T) & (expert < E))


def tokens_per_program(columns: int) -> int:
    return max(1, min(32, 2048 // columns))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor, top_k: int, groups: int, kept: int, normalise: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, experts = logits_TE.shape
        device = logits_TE.device
        ids_TK = torch.empty((tokens, top_k), dtype=torch.int64, device=device)
        weights_TK = torch.empty((tokens, top_k), dtype=torch.float32, device=device)
        counts_E = torch.zeros(experts, dtype=torch.int64, device=device)
        g, x = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
        together = tokens_per_program(g * x)
        if tokens:
            _route[(contiguous_blocks(tokens, together),)](
                logits_TE, bias_E, ids_TK, weights_TK, counts_E, tokens, experts, scale,
                TOKENS=together, GROUPS=groups, KEPT=kept, MEMBERS=experts // groups, G=g, X=x,
                K=top_k, SLOTS=triton.next_power_of_2(top_k), NORMALISE=normalise,
            )  # fmt: skip
        ctx.save_for_backward(logits_TE, ids_TK)
        ctx.normalise, ctx.scale = normalise, scale
        ctx.mark_non_differentiable(ids_TK, counts_E)
        return ids_TK, weights_TK, counts_E

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        logits_TE, ids_TK = ctx.saved_tensors
        (tokens, experts), top_k = logits_TE.shape, ids_TK.shape[1]
        d_logits_TE = torch.empty_like(logits_TE)
        width = triton.next_power_of_2(experts)
        together = tokens_per_program(width)
        if tokens:
            _route_backward[(contiguous_blocks(tokens, together),)](
                grads[1].contiguous(), logits_TE, ids_TK, d_logits_TE, tokens, experts, ctx.scale,
                TOKENS=together, WIDTH=width, K=top_k, SLOTS=triton.next_power_of_2(top_k), NORMALISE=ctx.normalise,
            )  # fmt: skip
        return d_logits_TE, None, None, None, None, None, None


def route_triton(
    logits_TE: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`route_reference` for contiguous FP32 logits and bias. Raises ValueError for other inputs."""
    _check(logits_TE, bias_E, top_k, n_group, topk_group)
    routed: tuple[Tensor, Tensor, Tensor] = _Route.apply(  # type: ignore[no-untyped-call]
        logits_TE, bias_E, top_k, n_group, topk_group, normalise, scale
    )
    return routed


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses `top_k` experts per token from FP32 logits. (float64 logits use the reference on every device.)

    Returns (ids_TK int64, best biased score first; weights_TK in the logits' dtype, differentiable; counts_E int64, the
    number of (token, slot) pairs of each expert, summing to T * K). Groups have at least two experts.
    """
    options: dict[str, Any] = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}
    options |= {"normalise": normalise, "scale": scale}
    if backend(logits_TE) == "triton" and logits_TE.dtype != torch.float64:
        return route_triton(logits_TE.contiguous(), bias_E.contiguous(), **options)
    return route_reference(logits_TE, bias_E, **options)
