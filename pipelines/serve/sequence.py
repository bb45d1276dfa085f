"""Requests, and the sequences that answer them.

Notable: a sequence is a list of ids (bos, prompt, generated) and the number `computed` of ids whose latents are in the
cache. Prefill, a chunk of a long prefill, and decode are then the same operation: run the ids from `computed`.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moray.pipelines.serve.detokenizer import Released, TextStream, Token

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]
SEEDS = range(-(1 << 63), 1 << 63)


@dataclass(frozen=True)
class Request:
    """One prompt and its generation parameters. Raises ValueError naming the field for a value out of range.

    prompt: ids without bos, which is prepended unless `bare`. max_tokens: maximum ids to generate; 0 only reads the
    prompt. temperature: 0 is greedy. seed: None draws a random one. logprobs: None for none, else the number of best
    alternatives to report in addition to each token's own. echo: whether the answer starts with the prompt.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False
    ignore_eos: bool = False
    bare: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens = {self.max_tokens} must not be negative")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be a finite number of at least 0")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p = {self.top_p} must be between 0 and 1")
        if "" in self.stop:
            raise ValueError("stop must not contain an empty string")
        if self.seed is not None and self.seed not in SEEDS:
            raise ValueError(f"seed = {self.seed} must fit into 64 bits")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs = {self.logprobs} must not be negative")


@dataclass(frozen=True)
class Delta:
    """The part of an answer that one step added. generated: ids generated so far, including those not yet released."""

    text: str
    tokens: tuple[Token, ...] = ()
    generated: int = 0
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Sequence:
    """A request being answered. ids: bos, prompt and generated ids. blocks: cache blocks, allocated on admission."""

    request: Request
    ids: list[int]
    prompt_length: int
    text: TextStream
    generator: torch.Generator | None
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    prompt_tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def pending(self) -> int:
        """Number of ids whose latents are not in the cache: the rest of the prompt, or the last generated id."""
        return len(self.ids) - self.computed

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt_length

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def reserved_positions(self) -> int:
        """Maximum positions that the sequence can need; the last generated id is never run."""
        return self.prompt_length + max(self.request.max_tokens - 1, 0)

    @property
    def tokens_left(self) -> int:
        """Ids that the sequence still reads or writes, at most."""
        return max(0, self.prompt_length - self.computed) + max(0, self.request.max_tokens - self.generated)

    @property
    def scores_prompt(self) -> bool:
        return self.request.echo and self.request.logprobs is not None

    def after_prefill(self) -> Delta | None:
        """The delta after the prompt was read: the echo, and the end if max_tokens is 0; None if it is empty."""
        released = self.text.echo(self.prompt_tokens) if self.request.echo else Released()
        if self.request.max_tokens == 0:
            self.finish_reason = "length"
            released += self.text.finish()
        return self._delta(released)

    def accept(self, token: Token, ends: Container[int]) -> Delta | None:
        """Appends the next token. Returns the delta, None if it is empty. ends: ids that end an answer."""
        self.ids.append(token.id)
        released = self.text.push(token)
        if self.text.stopped or (token.id in ends and not self.request.ignore_eos):
            self.finish_reason = "stop"
        elif self.generated >= self.request.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and not self.text.stopped:
            released += self.text.finish()
        return self._delta(released)

    def _delta(self, released: Released) -> Delta | None:
        if not released.text and not released.tokens and self.finish_reason is None:
            return None
        return Delta(released.text, released.tokens, self.generated, self.finish_reason)
