"""Answers to items by the serving engine: log-likelihoods of choices, and answers that follow a schema.

A choice is scored as evaluation harnesses do it: its ids are those of prompt and choice together after those of the
prompt alone, and the choice with the largest sum of log-likelihoods is the model's. `per_byte` divides by the choice's
length in bytes, which makes choices of different lengths comparable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moray.pipelines.serve.detokenizer import Token
from moray.pipelines.serve.engine import ContextLengthError, Engine
from moray.pipelines.serve.grammar import GrammarCompiler, GrammarError, of_schema
from moray.pipelines.serve.sequence import Request
from moray.pipelines.tasks.task_file import TaskItem
from moray.platform.core.errors import InputError

_OPEN = 64  # requests at a time


@dataclass(frozen=True)
class ItemResult:
    """What a model did with an item. loglikelihoods: of the choices. answer: the text for a schema; complete: whether
    it is valid JSON of the schema, and not cut by `max_tokens`."""

    item: TaskItem
    loglikelihoods: tuple[float, ...] = ()
    answer: str = ""
    complete: bool = False

    @property
    def scores(self) -> dict[str, float]:
        """1 for right and 0 for wrong, by metric."""
        if not self.item.choices:
            return {"task_complete": float(self.complete)}
        sizes = [len(choice.encode()) for choice in self.item.choices]
        per_byte = [value / size for value, size in zip(self.loglikelihoods, sizes, strict=True)]
        return {
            "task_accuracy": float(_best(self.loglikelihoods) == self.item.answer),
            "task_accuracy_per_byte": float(_best(per_byte) == self.item.answer),
        }


def answer_items(engine: Engine, items: Sequence[TaskItem], max_tokens: int) -> Iterator[ItemResult]:
    """The results of items of one kind, in order. Raises InputError for an item that does not fit the model."""
    requests = _Requests(engine, max_tokens)
    most = max([1, *(len(item.choices) for item in items)])
    size = max(1, _OPEN // most)
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        yield from _choices(engine, requests, batch) if batch[0].choices else _schemas(engine, requests, batch)


class _Requests:
    """Requests of the engine for items."""

    def __init__(self, engine: Engine, max_tokens: int) -> None:
        self._engine, self._max_tokens = engine, max_tokens
        self._grammars = GrammarCompiler(engine.vocabulary)

    def choice(self, item: TaskItem, choice: str) -> tuple[Request, int]:
        """The request that scores a choice, and how many ids of it are the choice's."""
        encode = self._engine.vocabulary.encode
        context, whole = encode(item.prompt), encode(item.prompt + choice)
        scored = max(1, len(whole) - len(context))
        return Request(tuple(whole), max_tokens=0, temperature=0.0, logprobs=0, echo=True), scored

    def schema(self, item: TaskItem) -> Request:
        try:
            grammar = self._grammars.compile(of_schema(item.schema_ or {}))
        except GrammarError as error:
            raise InputError(f"the schema of {item.prompt[:40]!r}: {error}", "use another schema") from error
        prompt = tuple(self._engine.vocabulary.encode(item.prompt))
        return Request(prompt, max_tokens=self._max_tokens, temperature=0.0, grammar=grammar)


@dataclass
class Answered:
    """What the engine answered to one request. tokens: those with a log probability. ended: by itself, not cut."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    ended: bool = False


def _choices(engine: Engine, requests: _Requests, items: Sequence[TaskItem]) -> Iterator[ItemResult]:
    asked = [[requests.choice(item, choice) for choice in item.choices] for item in items]
    told = iter(answer_requests(engine, [request for pairs in asked for request, _ in pairs]))
    for item, pairs in zip(items, asked, strict=True):
        sums = [sum(token.logprob or 0.0 for token in next(told).tokens[-count:]) for _, count in pairs]
        yield ItemResult(item, tuple(sums))


def _schemas(engine: Engine, requests: _Requests, items: Sequence[TaskItem]) -> Iterator[ItemResult]:
    told = answer_requests(engine, [requests.schema(item) for item in items])
    for item, answered in zip(items, told, strict=True):
        if answered.ended:
            json.loads(answered.text)
        yield ItemResult(item, answer=answered.text, complete=answered.ended)


def answer_requests(engine: Engine, requests: Sequence[Request]) -> list[Answered]:
    """The answers to requests, in order, computed together. Raises InputError for one that does not fit the model."""
    try:
        answers = [engine.submit(request) for request in requests]
    except (ContextLengthError, ValueError) as error:
        raise InputError(f"an item does not fit the model: {error}", "shorten it") from error
    told = {one: Answered() for one in answers}
    while engine.busy:
        for output in engine.step():
            if isinstance(output.result, Exception):
                raise output.result
            told[output.sequence].text += output.result.text
            told[output.sequence].tokens += [one for one in output.result.tokens if one.logprob is not None]
    for answer, one in told.items():
        one.ended = answer.finish_reason == "stop"
    return list(told.values())


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: values[index])
