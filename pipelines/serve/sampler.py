"""Sampling of ids from logits for a whole batch: greedy, temperature, top-k, nucleus (top-p, Holtzman et al. 2019) and
min-p (Nguyen et al. 2024), after penalties, biases and masks.

Notable: each draw takes one uniform number from the sequence's own generator and looks it up in the cumulative
distribution, so an answer depends only on its request and seed, not on the rest of the batch. Rows that keep the most
likely ids are sorted, and of a large vocabulary only the first `_HEAD` ids if the row keeps no others.

Shapes: B sequences, V vocabulary, K reported alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.pipelines.serve.detokenizer import Token

_HEAD = 1024  # ids that are sorted, if a row keeps no others
_NUMBERS = 1 << 22  # probabilities in FP64 at a time: 32 MB, several times


@dataclass(frozen=True)
class Draw:
    """Sampling parameters of one row, as in `Request`. generator: used if temperature > 0. adjust: changes the logits
    of the row, [V], in place."""

    temperature: float
    top_p: float
    generator: torch.Generator | None
    logprobs: int | None
    top_k: int = 0
    min_p: float = 0.0
    adjust: Callable[[Tensor], None] | None = None

    @property
    def sorted(self) -> bool:
        return self.top_p < 1 or self.top_k > 0


def sample(logits_BV: Tensor, draws: Sequence[Draw]) -> list[Token]:
    """One token per row of FP32 or FP64 logits. Log probabilities are the model's, at temperature 1."""
    chosen_BV = _adjusted(logits_BV, draws)
    ids = chosen_BV.argmax(-1).tolist()
    warm = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    most = max(1, _NUMBERS // logits_BV.shape[-1])
    for start in range(0, len(warm), most):
        rows = warm[start : start + most]
        for row, index in zip(rows, _drawn(chosen_BV[rows], [draws[row] for row in rows]), strict=True):
            ids[row] = index
    tokens = [Token(index) for index in ids]
    scored = [row for row, draw in enumerate(draws) if draw.logprobs is not None]
    if scored:
        results = score_tokens(
            logits_BV[scored], [ids[row] for row in scored], [draws[row].logprobs or 0 for row in scored]
        )
        for row, token in zip(scored, results, strict=True):
            tokens[row] = token
    return tokens


def score_tokens(logits_BV: Tensor, ids: Sequence[int], alternatives: Sequence[int]) -> list[Token]:
    """The given ids as tokens with log probabilities. alternatives: number of best alternatives of each row."""
    logprobs_BV = logits_BV.log_softmax(-1)
    chosen_B = logprobs_BV.gather(1, torch.tensor(ids, device=logits_BV.device).unsqueeze(1)).squeeze(1).tolist()
    most = min(max(alternatives), logits_BV.shape[-1])
    values_BK, places_BK = logprobs_BV.topk(most)
    best = [list(zip(p, v, strict=True)) for p, v in zip(places_BK.tolist(), values_BK.tolist(), strict=True)]
    rows = zip(ids, chosen_B, best, alternatives, strict=True)
    return [Token(index, chosen, tuple(pairs[:count])) for index, chosen, pairs, count in rows]


def _adjusted(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    if all(draw.adjust is None for draw in draws):
        return logits_BV
    adjusted_BV = logits_BV.clone()
    for row, draw in enumerate(draws):
        if draw.adjust is not None:
            draw.adjust(adjusted_BV[row])
    return adjusted_BV


def _drawn(logits_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """An id for each row, all of temperature > 0. Each row is sorted as far as it needs, whatever the others need."""
    logits_BV = logits_BV.double()
    temperatures_B1 = _column([draw.temperature for draw in draws], logits_BV)
    # Subtracts the maximum before the division, so that a temperature of 1e-9 does not overflow.
    probs_BV = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / temperatures_B1).softmax(-1)
    kinds: dict[int, list[int]] = {}  # rows by the number of ids to sort
    head_B = _head_mass(probs_BV, draws)
    for row, draw in enumerate(draws):
        whole = probs_BV.shape[-1]
        small = draw.top_k <= _HEAD if draw.top_k else draw.top_p < head_B[row]
        kinds.setdefault(0 if not draw.sorted else _HEAD if small and whole > 2 * _HEAD else whole, []).append(row)
    ids = [0] * len(draws)
    for count, rows in kinds.items():
        found = _look_up(probs_BV[rows], [draws[row] for row in rows], count)
        for row, index in zip(rows, found, strict=True):
            ids[row] = index
    return ids


def _head_mass(probs_BV: Tensor, draws: Sequence[Draw]) -> list[float]:
    """The probability of each row's `_HEAD` most likely ids; zeros if no row asks for it."""
    if probs_BV.shape[-1] <= 2 * _HEAD or not any(draw.top_p < 1 and not draw.top_k for draw in draws):
        return [0.0] * len(draws)
    mass: list[float] = probs_BV.topk(_HEAD, sorted=False).values.sum(-1).tolist()
    return mass


def _look_up(probs_BV: Tensor, draws: Sequence[Draw], count: int) -> list[int]:
    """An id for each row, after top-k, top-p and min-p. count: of the most likely ids, sorted; 0 for all, unsorted."""
    order_BV: Tensor | None = None
    if count:
        total_B1 = probs_BV.sum(-1, keepdim=True)
        whole = probs_BV.shape[-1]
        if count == whole:
            probs_BV, order_BV = torch.sort(probs_BV, dim=-1, descending=True, stable=True)
        else:
            probs_BV, order_BV = probs_BV.topk(count)
        most = [min(draw.top_k or whole, whole) for draw in draws]
        places_V = torch.arange(count, device=probs_BV.device)
        probs_BV = probs_BV.masked_fill(places_V >= _column(most, probs_BV), 0.0)
        before_BV = probs_BV.cumsum(-1) - probs_BV
        before_BV[:, 0] = -1.0  # always keeps the most likely id, also at top_p 0
        kept_B1 = torch.where(_column(most, probs_BV) < whole, probs_BV.sum(-1, keepdim=True), total_B1)
        limits_B1 = _column([draw.top_p for draw in draws], probs_BV) * kept_B1
        limits_B1[[draw.top_p == 1 for draw in draws]] = float("inf")  # whatever the rounding of the sum
        probs_BV = probs_BV.masked_fill(before_BV >= limits_B1, 0.0)
    least_B1 = _column([draw.min_p for draw in draws], probs_BV) * probs_BV.amax(-1, keepdim=True)
    probs_BV = probs_BV.masked_fill(probs_BV < least_B1, 0.0)
    cumulative_BV = probs_BV.cumsum(-1)
    uniforms_B1 = _column([_uniform(draw.generator) for draw in draws], probs_BV)
    # `right` finds the first position with a sum above the threshold, so an id of probability 0 is never drawn.
    # Rounding could exceed the total, so positions are clamped to the last id with a positive probability.
    places_B1 = torch.searchsorted(cumulative_BV, uniforms_B1 * cumulative_BV[:, -1:], right=True)
    last_B1 = probs_BV.shape[-1] - 1 - (probs_BV > 0).flip(-1).int().argmax(-1, keepdim=True)
    places_B1 = torch.minimum(places_B1, last_B1)
    ids_B1 = places_B1 if order_BV is None else order_BV.gather(1, places_B1)
    ids: list[int] = ids_B1.squeeze(1).tolist()
    return ids


def _uniform(generator: torch.Generator | None) -> float:
    assert generator is not None, "a sequence with temperature > 0 has a generator"
    return torch.rand((), dtype=torch.float64, generator=generator).item()


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
