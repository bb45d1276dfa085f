"""The serving engine as a model of the Language Model Evaluation Harness (`pip install 'moray[eval]'`).

Requests are those of the harness's `hf` backend: a text gets a bos if the tokenizer adds one, an empty context is bos,
contexts that are too long lose their beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.sequence import Request
from moray.pipelines.tasks.scoring import Answered, answer_requests
from moray.platform.core.errors import InputError

Pair: TypeAlias = "tuple[Any, list[int], list[int]]"  # texts, ids of the context, ids that are scored

_TOGETHER = 64  # requests at a time
_SEED = 1234  # of the first generation; the next ones have the next seeds
_MAX_TOKENS = 256  # of a generation, if the task does not say


class EngineLM(TemplateLM):
    """progress: called with the number of requests that were answered, and of all that are asked together."""

    def __init__(self, engine: Engine, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        super().__init__()
        self._engine, self._progress = engine, progress
        self._vocabulary = engine.vocabulary
        self.max_length = engine.config.max_position_embeddings - 1  # the harness scores one id after so many

    @property
    def eot_token_id(self) -> int:
        return self._id(self._vocabulary.eos, self._vocabulary.bos)

    @property
    def prefix_token_id(self) -> int:
        return self._id(self._vocabulary.bos, self._vocabulary.eos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        ids = self._vocabulary.encode(string)
        bos = self._vocabulary.bos
        adds = self._vocabulary.adds_bos if add_special_tokens is None else add_special_tokens
        return [bos, *ids] if adds and bos is not None and ids[:1] != [bos] else ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Sums over windows that overlap by one id."""
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._loglikelihood_tokens([pair for pairs in windows for pair in pairs]))
        return [sum(next(scores)[0] for _ in pairs) for pairs in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        asked = [self._generation(request.args[0], request.args[1], _SEED + n) for n, request in enumerate(requests)]
        return [answered.text for answered in self._answers(asked)]

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **options: Any) -> list[tuple[float, bool]]:
        asked, counts = [], []
        for _, context, scored in requests:
            ids = [*context, *scored][-self.max_length - 1 :]
            asked.append(Request(tuple(ids), max_tokens=0, temperature=0.0, logprobs=1, echo=True, bare=True))
            counts.append(len(scored))
        return [_score(answered, count) for answered, count in zip(self._answers(asked), counts, strict=True)]

    def _windows(self, text: str) -> list[Pair]:
        pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        return [(None, *make_disjoint_window(pair)) for pair in pairs]

    def _generation(self, context: str, settings: dict[str, Any], seed: int) -> Request:
        options = normalize_gen_kwargs(settings, _MAX_TOKENS)
        if options["max_gen_toks"] >= self.max_length:
            told = f"max_gen_toks = {options['max_gen_toks']} leaves no room for a prompt in {self.max_length} ids"
            raise InputError(told, "set a smaller one in generation_kwargs")
        ids, most = maybe_truncate(self.tok_encode(context), options["max_gen_toks"], self.max_length, verbose=False)
        return Request(
            tuple(ids),
            max_tokens=most,
            temperature=options.get("temperature", 0.0),
            top_p=options.get("top_p", 1.0),
            top_k=options.get("top_k", 0),
            stop=tuple(options["until"]),
            seed=seed,
            bare=True,
        )

    def _answers(self, requests: Sequence[Request]) -> list[Answered]:
        """In the order of the requests. The longest come first, so that the time left is not underestimated."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))
        found: dict[int, Answered] = {}
        for start in range(0, len(order), _TOGETHER):
            some = order[start : start + _TOGETHER]
            found.update(zip(some, answer_requests(self._engine, [requests[index] for index in some]), strict=True))
            self._progress(len(found), len(order))
        return [found[index] for index in range(len(requests))]

    def _id(self, first: int | None, second: int | None) -> int:
        found = second if first is None else first
        if found is None:
            raise ValueError("the tokenizer has neither bos nor eos, one of which precedes a text without context")
        return found


def _score(answered: Answered, count: int) -> tuple[float, bool]:
    """The log-likelihood of the last `count` ids, and whether each was the most likely one."""
    tokens = answered.tokens[-count:] if count else []
    greedy = all(token.logprob is not None and token.logprob >= token.top[0][1] for token in tokens)
    return sum(token.logprob or 0.0 for token in tokens), greedy
