"""Requests, and the sequences that answer them.

Notable: a sequence is a list of ids (bos, prompt, generated) and the number `computed` of ids whose latents are in the
cache. Prefill, a chunk of a long prefill, decode, and reading everything again after its blocks were taken, are then
the same operation: run the ids from `computed`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from moray.pipelines.serve.block_pool import BlockPool, Key, next_key
from moray.pipelines.serve.detokenizer import Released, TextStream, Token

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moray.pipelines.serve.grammar import Grammar, GrammarState

FinishReason = Literal["stop", "length"]
PROMPT_SHARE = 8  # ids of a prompt that count as one decoded id
SEEDS = range(-(1 << 63), 1 << 63)


@dataclass(frozen=True)
class Request:
    """One prompt and its generation parameters. Raises ValueError naming the field for a value out of range.

    prompt: ids without bos, which is prepended unless `bare`. max_tokens: maximum ids to generate; 0 only reads the
    prompt. min_tokens: ids before which no end id is generated. temperature: 0 is greedy. top_k: 0 for all. min_p: the
    least probability, over the largest one. seed: None draws a random one. logprobs: None for none, else the number of
    best alternatives to report in addition to each token's own. echo: whether the answer starts with the prompt.

    presence_penalty, frequency_penalty: subtracted from the logits of generated ids, once and by their number.
    repetition_penalty: divides positive logits, and multiplies negative ones, of ids in the prompt or the answer.
    logit_bias: (id, added to its logit). stop_ids: end the answer, as end-of-document ids do.
    cache_salt: only requests with the same one share blocks of the cache. grammar: that the answer follows, to its end.
    shown: ids of control tokens that have text in the answer: their names. tenant: all tenants get the same share of
    the engine's work. embed: whether the answer has the mean of the prompt's states; then max_tokens is 0.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False
    ignore_eos: bool = False
    bare: bool = False
    cache_salt: str = ""
    grammar: Grammar | None = None
    shown: frozenset[int] = frozenset()
    tenant: str = ""
    embed: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens = {self.max_tokens} must not be negative")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be a finite number of at least 0")
        for name in ("top_p", "min_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} = {getattr(self, name)} must be between 0 and 1")
        for name in ("top_k", "min_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty = {self.repetition_penalty} must be a positive number")
        if "" in self.stop:
            raise ValueError("stop must not contain an empty string")
        if self.seed is not None and self.seed not in SEEDS:
            raise ValueError(f"seed = {self.seed} must fit into 64 bits")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs = {self.logprobs} must not be negative")
        if self.embed and (self.max_tokens or self.echo):
            raise ValueError("embed reads the prompt only: max_tokens must be 0, and echo false")


@dataclass(frozen=True)
class Delta:
    """The part of an answer that one step added. generated: ids generated so far, including those not yet released.
    cached: ids of the prompt that were in the cache. embedding: the mean of the prompt's states, if it was asked for,
    float32 [D]."""

    text: str
    tokens: tuple[Token, ...] = ()
    generated: int = 0
    finish_reason: FinishReason | None = None
    cached: int = 0
    embedding: Tensor | None = None


@dataclass(eq=False)
class Sequence:
    """A request being answered.

    ids: bos, prompt and generated ids. blocks: that it holds in the cache. cached: ids of the prompt whose latents were
    there before. leader: another sequence with the same prompt, whose blocks this one shares once they are full.
    grammar: the place of the answer in its grammar. scored: ids of the prompt that
    have their scores, or whose states are in the sum `states` [D].
    served, waited, since, goal: the scheduler's. closed: whether it is no longer open.
    """

    request: Request
    ids: list[int]
    prompt_length: int
    text: TextStream
    generator: torch.Generator | None
    leader: Sequence | None = None
    grammar: GrammarState | None = None
    scored: int = 0
    states: Tensor | None = None
    computed: int = 0
    cached: int = 0
    served: float = 0.0
    waited: int = 0
    since: int = 0
    goal: int = 0
    closed: bool = False
    blocks: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)  # of generated ids
    prompt_tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    _keys: list[Key] = field(default_factory=list)
    _sealed: int = 0

    @property
    def pending(self) -> int:
        """Number of ids whose latents are not in the cache: the rest of the prompt, or the last generated id."""
        return len(self.ids) - self.computed

    @property
    def reading(self) -> bool:
        """Whether ids other than the last generated one are to be run."""
        return self.pending > 1 or not self.generated

    @property
    def cost(self) -> float:
        """What its next turn takes, in decoded ids: the rest of its prompt, or one id."""
        return self.pending / PROMPT_SHARE if self.reading else 1.0

    @property
    def waits(self) -> bool:
        """Whether it waits for its leader to read the prompt."""
        leader = self.leader
        return leader is not None and not leader.closed and leader.reading and not self.blocks

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def tokens_left(self) -> int:
        """Ids that the sequence still reads or writes, at most."""
        return max(0, self.prompt_length - self.computed) + max(0, self.request.max_tokens - self.generated)

    @property
    def scores_prompt(self) -> bool:
        return self.request.echo and self.request.logprobs is not None

    @property
    def wants_prompt(self) -> bool:
        """Whether it needs the model's output for each id of the prompt."""
        return self.scores_prompt or self.request.embed

    @cached_property
    def prompt_set(self) -> Tensor:
        """The ids of the prompt, each once, int64."""
        import torch

        return torch.tensor(sorted(set(self.ids[: self.prompt_length])))

    def find_blocks(self, pool: BlockPool) -> None:
        """Takes the blocks of the cache that begin with the same ids. The last id is left to be run."""
        if self.wants_prompt:
            return
        whole = (len(self.ids) - 1) // pool.block_size
        if self.leader is not None and not self._keys:
            self._keys = self.leader._keys[: self.prompt_length // pool.block_size]
        self._extend_keys(whole, pool.block_size)
        self.blocks = pool.find(self._keys[:whole])
        self.computed = len(self.blocks) * pool.block_size
        self._sealed = len(self.blocks)
        if not self.generated:
            self.cached = self.computed

    def seal_blocks(self, pool: BlockPool) -> None:
        """Makes the blocks that are full known to other sequences."""
        full = self.computed // pool.block_size
        self._extend_keys(full, pool.block_size)
        for index in range(self._sealed, full):
            pool.seal(self.blocks[index], self._keys[index])
        self._sealed = max(self._sealed, full)

    def lose_blocks(self, kept: int = 0, block_size: int = 1) -> None:
        """Its blocks after the first `kept` have been released."""
        self.blocks = self.blocks[:kept]
        self.computed = min(self.computed, kept * block_size)
        self._sealed = min(self._sealed, kept)

    def _extend_keys(self, count: int, size: int) -> None:
        for index in range(len(self._keys), count):
            before = self._keys[-1] if self._keys else self.request.cache_salt.encode()
            self._keys.append(next_key(before, self.ids[index * size : (index + 1) * size]))

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
        self.counts[token.id] += 1
        if self.grammar is not None:
            self.grammar.accept(token.id)
        released = self.text.push(token)
        ended = (token.id in ends and not self.request.ignore_eos) or token.id in self.request.stop_ids
        ended = ended or (self.grammar is not None and self.grammar.ended)
        if self.text.stopped or ended:
            self.finish_reason = "stop"
        elif self.generated >= self.request.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and not self.text.stopped:
            released += self.text.finish()
        return self._delta(released)

    def _delta(self, released: Released) -> Delta | None:
        if not released.text and not released.tokens and self.finish_reason is None:
            return None
        embedding = None if self.states is None else self.states / self.prompt_length
        return Delta(released.text, released.tokens, self.generated, self.finish_reason, self.cached, embedding)
