"""A request and the sequence that answers it: what is asked, how far it has come, and what it has said.

Notable: a sequence is a list of ids (bos, prompt, generated) and one number, `computed`: how many of them have their
latents in the cache. Prefill, a chunk of a long prefill and decode are then one thing: run the ids from `computed` on.
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
    """One prompt and how to continue it. A value out of range raises ValueError naming the field.

    prompt: ids without bos, which is put in front of them unless `bare`. max_tokens: most ids to generate; 0 only reads
    the prompt. temperature: 0 is greedy. seed: None draws a new one. logprobs: None for none, else how many of the best
    alternatives to report beside each token's own. echo: the answer starts with the prompt.
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
            raise ValueError(f"temperature = {self.temperature} must be a number from 0 on")
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"top_p = {self.top_p} must lie between 0 and 1")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which would stop at once")
        if self.seed is not None and self.seed not in SEEDS:
            raise ValueError(f"seed = {self.seed} must fit into 64 bits")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs = {self.logprobs} must not be negative")


@dataclass(frozen=True)
class Delta:
    """What one step added to an answer. `generated` counts the ids generated so far, also those not yet shown."""

    text: str
    tokens: tuple[Token, ...] = ()
    generated: int = 0
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Sequence:
    """A request on its way. `ids` starts with bos; `blocks` are the cache's, taken when it is admitted."""

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
        """Ids whose latents are not in the cache: the rest of the prompt, or the one id to decode from."""
        return len(self.ids) - self.computed

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt_length

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def reserved_positions(self) -> int:
        """Positions that it may come to need: the last id generated is never run."""
        return self.prompt_length + max(self.request.max_tokens - 1, 0)

    @property
    def scores_prompt(self) -> bool:
        return self.request.echo and self.request.logprobs is not None

    def after_prefill(self) -> Delta | None:
        """What there is to say once the prompt is read: the echo, and the end if nothing is to be generated."""
        said = self.text.echo(self.prompt_tokens) if self.request.echo else Released()
        if self.request.max_tokens == 0:
            self.finish_reason = "length"
            said += self.text.finish()
        return self._delta(said)

    def accept(self, token: Token, ends: Container[int]) -> Delta | None:
        """Takes the next token; returns what can be shown now, None if nothing. ends: ids that end an answer."""
        self.ids.append(token.id)
        said = self.text.push(token)
        if self.text.stopped or (token.id in ends and not self.request.ignore_eos):
            self.finish_reason = "stop"
        elif self.generated >= self.request.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and not self.text.stopped:
            said += self.text.finish()
        return self._delta(said)

    def _delta(self, said: Released) -> Delta | None:
        if not said.text and not said.tokens and self.finish_reason is None:
            return None
        return Delta(said.text, said.tokens, self.generated, self.finish_reason)
