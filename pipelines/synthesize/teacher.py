"""Asks an OpenAI-compatible endpoint: once for each request ever, within the budget, with retries and many at a time.

An answer is kept on disk under a hash of model, prompt, parameters and seed. Trouble comes back as an `Answer` that
names it, so that one item's trouble is nobody else's: `engine` (it failed, after all retries), `prompt` (it refuses
this prompt), `budget`. What no request could survive (a wrong key, an unknown model) raises InputError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moray.pipelines.synthesize.budget_tracker import BudgetTracker, dollars
from moray.pipelines.synthesize.config import Budget, Teacher
from moray.platform.core.atomic import write_bytes
from moray.platform.core.errors import InputError

_PER_MESSAGE = 64  # tokens that a chat template adds, at most


@dataclass(frozen=True)
class Answer:
    """text: '' where `trouble` says why there is none. cost: dollars, when it was first asked."""

    text: str = ""
    trouble: str = ""
    detail: str = ""
    cost: float = 0.0


class TeacherClient:
    """One task's way to the teacher. `threads`: how many requests it has under way."""

    def __init__(self, teacher: Teacher, budget: Budget, tracker: BudgetTracker, cache: Path, threads: int) -> None:
        from openai import OpenAI

        self._teacher, self._budget, self._tracker, self._cache = teacher, budget, tracker, cache
        self._threads = max(threads, 1)
        key = teacher.api_key.reveal() if teacher.api_key else "none"
        self._client = OpenAI(
            base_url=teacher.url, api_key=key, max_retries=teacher.retries, timeout=teacher.timeout
        )  # retries wait longer and longer: connection errors, 408, 409, 429 and 5xx

    @property
    def model(self) -> str:
        return self._teacher.model

    def ask(self, prompts: Sequence[tuple[str, int]]) -> list[Answer]:
        """An answer for each (prompt, seed)."""
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(lambda one: self._one(*one), prompts))

    def _one(self, prompt: str, seed: int) -> Answer:
        key = self._key(prompt, seed)
        path = self._cache / key[:2] / f"{key}.json"
        if path.exists():
            return self._read(json.loads(path.read_bytes()))
        bound = len(prompt.encode()) + _PER_MESSAGE  # a token is a byte at least
        if refused := self._tracker.reserve(key, bound, self._teacher.max_tokens):
            return Answer(trouble=refused, detail="not sent")
        try:
            text, prompt_tokens, answer_tokens = self._send(prompt, seed)
        except InputError:
            self._tracker.failed(key, engine=False)
            raise
        except _Trouble as trouble:
            self._tracker.failed(key, engine=trouble.kind == "engine")
            return Answer(trouble=trouble.kind, detail=str(trouble))
        used = (
            bound if prompt_tokens is None else prompt_tokens,
            self._teacher.max_tokens if answer_tokens is None else answer_tokens,
        )
        self._tracker.settle(key, *used)
        record = {"text": text, "prompt_tokens": used[0], "answer_tokens": used[1]}
        write_bytes(path, json.dumps(record).encode())
        return self._read(record)

    def _read(self, record: dict[str, Any]) -> Answer:
        return Answer(record["text"], cost=dollars(self._budget, record["prompt_tokens"], record["answer_tokens"]))

    def _key(self, prompt: str, seed: int) -> str:
        own = self._teacher
        parts = [own.model, own.chat, prompt, own.temperature, own.top_p, own.max_tokens, seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _send(self, prompt: str, seed: int) -> tuple[str, int | None, int | None]:
        import openai

        own = self._teacher
        rules: dict[str, Any] = {
            "model": own.model, "temperature": own.temperature, "top_p": own.top_p, "max_tokens": own.max_tokens,
            "seed": seed,
        }  # fmt: skip
        try:
            if own.chat:
                chat = self._client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **rules)
                text, usage = chat.choices[0].message.content, chat.usage
            else:
                plain = self._client.completions.create(prompt=prompt, **rules)
                text, usage = plain.choices[0].text, plain.usage
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise InputError(
                f"{own.url} refuses model {own.model!r}: {error.message}",
                "correct url, model or api_key of the teacher",
            ) from error
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
            raise _Trouble("engine", f"{type(error).__name__}: {error}") from error
        except openai.APIStatusError as error:
            raise _Trouble("prompt", f"{type(error).__name__}: {error.message}") from error
        except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise _Trouble("prompt", f"an answer that is none: {type(error).__name__}: {error}") from error
        if not text:
            raise _Trouble("prompt", "an empty answer")
        return text, usage.prompt_tokens if usage else None, usage.completion_tokens if usage else None


class _Trouble(Exception):
    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind
