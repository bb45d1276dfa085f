"""Sigmoid routing with a selection bias and a group limit (DeepSeek-V3 §2.1.2, equations 12-16).

Scores are sigmoids of the logits. The bias moves only the *selection*; the weights that multiply the experts'
outputs come from the unbiased scores. With a group limit, the groups whose two best biased scores sum highest are
kept (`topk_group` of `n_group`), and the top K experts are taken among theirs.

Notable: selection sorts stably, so that equal scores go to the lower expert id, on every device. `torch.topk`
promises no order among equals, and saturated FP32 sigmoids do collide.

Shapes: T tokens, E experts, G groups, K slots (experts per token).
"""

import torch
from torch import Tensor

# Keeps the normalisation finite when every chosen score underflows to zero.
_TINY = 1e-20


def _best(scores_XE: Tensor, k: int) -> Tensor:
    return torch.sort(scores_XE, dim=-1, descending=True, stable=True).indices[..., :k]


def _outside_best_groups(choice_TE: Tensor, n_group: int, topk_group: int) -> Tensor:
    """True where an expert's group is not among the token's best `topk_group` groups."""
    grouped_TGX = torch.unflatten(choice_TE, -1, (n_group, -1))
    group_score_TG = grouped_TGX.topk(2, dim=-1).values.sum(-1)
    dropped_TG = torch.ones_like(group_score_TG, dtype=torch.bool)
    dropped_TG.scatter_(-1, _best(group_score_TG, topk_group), False)
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

    Returns (ids_TK int64, best biased score first; weights_TK in the logits' dtype, differentiable; counts_E int64,
    how many (token, slot) pairs each expert got, summing to T * K). Groups hold at least two experts.
    """
    scores_TE = logits_TE.sigmoid()
    with torch.no_grad():
        choice_TE = scores_TE + bias_E
        if topk_group < n_group:
            # -inf and not 0: a bias may push the scores of kept experts below zero.
            choice_TE.masked_fill_(_outside_best_groups(choice_TE, n_group, topk_group), float("-inf"))
        ids_TK = _best(choice_TE, top_k)
        flat = ids_TK.flatten()
        counts_E = torch.zeros(logits_TE.shape[-1], dtype=torch.int64, device=flat.device)
        counts_E.scatter_add_(0, flat, torch.ones_like(flat))
    weights_TK = scores_TE.gather(-1, ids_TK)
    if normalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _TINY)
    return ids_TK, weights_TK * scale, counts_E


def sequence_balance_reference(logits_TE: Tensor, top_k: int, sequences: int) -> Tensor:
    """The sequence-wise balance loss of one layer without its factor alpha (DeepSeek-V3 §2.1.2, equations 17-20).

    Over each of `sequences` equal runs of tokens: the sum over experts of f (its share of the tokens' top K, times E /
    K) times P (its mean share of a token's scores). 1 is even. Returns the sum over sequences, times their length, so
    that a division by the batch's tokens leaves the mean; differentiable in the logits through P.

    Notable: f counts the top K of the unbiased scores, without group limit, as in the paper: the loss speaks of what
    the router learnt, not of what the bias corrected.
    """
    tokens, experts = logits_TE.shape
    scores_BTE = torch.unflatten(logits_TE.sigmoid(), 0, (sequences, -1))
    with torch.no_grad():
        ids_BX = _best(scores_BTE, top_k).flatten(1)
        share_BE = scores_BTE.new_zeros(sequences, experts)
        share_BE.scatter_add_(1, ids_BX, torch.ones_like(ids_BX, dtype=share_BE.dtype))
        share_BE *= experts * sequences / (top_k * max(tokens, 1))
    mean_BE = (scores_BTE / (scores_BTE.sum(-1, keepdim=True) + _TINY)).sum(1)
    return (share_BE * mean_BE).sum()


route = route_reference
sequence_balance = sequence_balance_reference
