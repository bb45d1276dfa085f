"""Changes of a sequence's logits before sampling: penalties, biases, least lengths, and grammars.

The formulas are those of OpenAI's API (presence, frequency), and of CTRL (repetition; Keskar et al. 2019).

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from moray.pipelines.serve.sequence import Sequence


def is_greedy(sequence: Sequence) -> bool:
    """Whether the next id is that of the largest logit, and nothing else is reported."""
    request = sequence.request
    return request.temperature == 0 and request.logprobs is None and not _adjusts(sequence)


def _adjusts(sequence: Sequence) -> bool:
    request = sequence.request
    penalized = request.presence_penalty or request.frequency_penalty or request.repetition_penalty != 1
    short = sequence.generated < request.min_tokens
    return bool(short or penalized or request.logit_bias or sequence.grammar)


def adjustment(sequence: Sequence, ends: Collection[int]) -> Callable[[Tensor], None] | None:
    """Changes logits_V in place for the sequence's next id; None if the request changes nothing. ends: ids that end an
    answer."""
    request = sequence.request
    if not _adjusts(sequence):
        return None
    short = sequence.generated < request.min_tokens

    def adjust(logits_V: Tensor) -> None:
        if request.repetition_penalty != 1:
            _repetition(logits_V, sequence, request.repetition_penalty)
        if (request.presence_penalty or request.frequency_penalty) and sequence.counts:
            ids = torch.tensor(list(sequence.counts), device=logits_V.device)
            counts = torch.tensor(list(sequence.counts.values()), dtype=logits_V.dtype, device=logits_V.device)
            logits_V[ids] -= request.presence_penalty + request.frequency_penalty * counts
        if request.logit_bias:
            places, biases = zip(*request.logit_bias, strict=True)
            logits_V.index_add_(0, _ids(places, logits_V), torch.tensor(biases).to(logits_V))
        if short:
            own = (index for index in {*ends, *request.stop_ids} if index < len(logits_V))
            logits_V[_ids(own, logits_V)] = -torch.inf
        if sequence.grammar is not None:
            sequence.grammar.mask(logits_V, short)

    return adjust


def _ids(ids: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=like.device)


def _repetition(logits_V: Tensor, sequence: Sequence, penalty: float) -> None:
    """An id may be in both tensors: it then gets the same value twice."""
    seen = torch.cat([sequence.prompt_set.to(logits_V.device), _ids(sequence.counts, logits_V)])
    values = logits_V[seen]
    logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
