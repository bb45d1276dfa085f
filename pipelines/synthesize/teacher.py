"""Client of an OpenAI-compatible endpoint, with a disk cache, a budget, retries and concurrent requests.

Answers are cached on disk or in the store, under a hash of model, prompt, parameters and seed. A failure is returned as
an `Answer`, so that it affects only its own item: `engine` (the engine failed, after all retries), `prompt` (the engine
refused this prompt), `budget`. An error that affects every request (a wrong key, an unknown model) raises InputError.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from moray.pipelines.synthesize.budget_tracker import BudgetTracker, dollars
from moray.pipelines.synthesize.config import Budget, Teacher
from moray.platform.core.errors import InputError
from moray.platform.store.paths import AnyPath, write_file

_PER_MESSAGE = 64  # tokens that a chat template adds, at most


@dataclass(frozen=True)
class Answer:
    """text: '' if there is a `failure`. cost: dollars at the first request."""

    text: str = ""
    failure: str = ""
    detail: str = ""
    cost: float = 0.0


class TeacherClient:
    """One task's connection to the teacher. threads: maximum number of requests in flight."""

    def __init__(self, teacher: Teacher, budget: Budget, tracker: BudgetTracker, cache: AnyPath, threads: int) -> None:
        from openai import OpenAI

        self._teacher, self._budget, self._tracker, self._cache = teacher, budget, tracker, cache
        self._threads = max(threads, 1)
        key = teacher.api_key.reveal() if teacher.api_key else "none"
        # The client retries connection errors, 408, 409, 429 and 5xx with exponential back-off.
        self._client = OpenAI(base_url=teacher.url, api_key=key, max_retries=teacher.retries, timeout=teacher.timeout)

    @property
    def model(self) -> str:
        return self._teacher.model

    def query(self, prompts: Sequence[tuple[str, int]]) -> list[Answer]:
        """An answer for each (prompt, seed)."""
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(lambda one: self._one(*one), prompts))

    def _one(self, prompt: str, seed: int) -> Answer:
        key = self._key(prompt, seed)
        path = self._cache / key[:2] / f"{key}.json"
        with contextlib.suppress(FileNotFoundError):
            return self._read(json.loads(path.read_bytes()))
        bound = len(prompt.encode()) + _PER_MESSAGE  # a token has at least one byte
        if refusal := self._tracker.reserve(key, bound, self._teacher.max_tokens):
            return Answer(failure=refusal, detail="not sent")
        try:
            text, prompt_tokens, answer_tokens = self._send(prompt, seed)
        except InputError:
            self._tracker.failed(key, engine=False)
            raise
        except _RequestFailed as failure:
            self._tracker.failed(key, engine=failure.kind == "engine")
            return Answer(failure=failure.kind, detail=str(failure))
        used = (
            bound if prompt_tokens is None else prompt_tokens,
            self._teacher.max_tokens if answer_tokens is None else answer_tokens,
        )
        self._tracker.settle(key, *used)
        record = {"text": text, "prompt_tokens": used[0], "answer_tokens": used[1]}
        write_file(path, json.dumps(record).encode())
        return self._read(record)

    def _read(self, record: dict[str, Any]) -> Answer:
        return Answer(record["text"], cost=dollars(self._budget, record["prompt_tokens"], record["answer_tokens"]))

    def _key(self, prompt: str, seed: int) -> str:
        teacher = self._teacher
        parts = [teacher.model, teacher.chat, prompt, teacher.temperature, teacher.top_p, teacher.max_tokens, seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _send(self, prompt: str, seed: int) -> tuple[str, int | None, int | None]:
        import openai

        teacher = self._teacher
        parameters: dict[str, Any] = {
            "model": teacher.model, "temperature": teacher.temperature, "top_p": teacher.top_p,
            "max_tokens": teacher.max_tokens, "seed": seed,
        }  # fmt: skip
        try:
            if teacher.chat:
                chat = self._client.chat.completions.create(
                    messages=[{"role": "user", "content": prompt}], **parameters
                )
                text, usage = chat.choices[0].message.content, chat.usage
            else:
                plain = self._client.completions.create(prompt=prompt, **parameters)
                text, usage = plain.choices[0].text, plain.usage
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise InputError(
                f"{teacher.url} refused model {teacher.model!r}: {error.message}",
                "correct url, model or api_key of the teacher",
            ) from error
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
            raise _RequestFailed("engine", f"{type(error).__name__}: {error}") from error
        except openai.APIStatusError as error:
            raise _RequestFailed("prompt", f"{type(error).__name__}: {error.message}") from error
        except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise _RequestFailed("prompt", f"invalid response: {type(error).__name__}: {error}") from error
        if not text:
            raise _RequestFailed("prompt", "an empty answer")
        return text, usage.prompt_tokens if usage else None, usage.completion_tokens if usage else None


class _RequestFailed(Exception):
    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind
