"""The inference engine: runs many requests concurrently on one model and one latent cache.

`step()` runs the scheduler's plan, one forward, and returns the delta of each answer. It is plain synchronous Python:
`async_engine.py` calls it from a thread, tests and benchmarks call it directly.

Notable: an error ends only its own request. A forward or a draw that fails is repeated one sequence at a time, which is
safe because rewriting a latent gives the same latent, and only the failing sequence ends with the error. Blocks are
zeroed when they are taken: positions after a sequence's last have weight 0, and 0 times an old NaN would be NaN.

Shapes: W tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.models.config import ModelConfig
from moray.models.rows import RowModel, Span
from moray.pipelines.serve.adjustments import adjustment, is_greedy
from moray.pipelines.serve.block_pool import BlockPool
from moray.pipelines.serve.detokenizer import ServingVocabulary, TextStream, Token
from moray.pipelines.serve.prompt_pace import PromptPace
from moray.pipelines.serve.sampler import Draw, sample, score_tokens
from moray.pipelines.serve.scheduler import Chunk, EngineLimits, Scheduler
from moray.pipelines.serve.sequence import Delta, Request, Sequence


class ContextLengthError(ValueError):
    """Prompt and max_tokens together exceed the model's context length or the cache."""


@dataclass(frozen=True)
class Output:
    """The result of a step for one sequence: a delta, or the error that ended it."""

    sequence: Sequence
    result: Delta | Exception


class Engine:
    """Runs requests on a model. Not thread-safe. notice: what whoever serves the model should know."""

    def __init__(
        self, model: RowModel, vocabulary: ServingVocabulary, limits: EngineLimits | None = None, notice: str = ""
    ) -> None:
        limits = limits or EngineLimits()
        self.notice = notice
        self.model = model
        self.config = model.config
        self.vocabulary = vocabulary
        # The last rows of a padded vocabulary are not tokens.
        named = max(len(vocabulary.pieces), max(vocabulary.ends, default=-1) + 1)
        self.tokens = min(named, model.config.vocab_size)
        # Bytes of the longest text that fits into the context.
        self.longest_text = model.config.max_position_embeddings * vocabulary.longest_piece
        blocks = cache_blocks(model.config, limits, model.element_bytes)
        self.pool = BlockPool(blocks, limits.block_size)
        self._cache = model.cache(blocks, limits.block_size)
        self._scheduler = Scheduler(self.pool, limits)
        self._pace = PromptPace()

    @property
    def busy(self) -> bool:
        return self._scheduler.busy

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Those of the last step."""
        return self._scheduler.running

    @property
    def sequences(self) -> list[Sequence]:
        """All open sequences."""
        return self._scheduler.sequences

    def expert_load(self) -> tuple[float, ...]:
        """By MoE layer: rows of the most loaded expert over the mean, since the start; 0 before the first row."""
        rows_LE = self.model.expert_rows()
        loads = [rows_LE[layer].tolist() for layer in self.config.moe_layers]
        return tuple(round(max(load) * len(load) / sum(load), 3) if sum(load) else 0.0 for load in loads)

    def check(self, request: Request) -> None:
        """Raises ValueError for an invalid request, with the name of its field first, and ContextLengthError for one
        that is too long."""
        for index in (min(request.prompt), max(request.prompt)) if request.prompt else ():
            if not 0 <= index < self.tokens:
                raise ValueError(f"prompt: id {index} is outside the vocabulary of {self.tokens}")
        for name, given in (("logit_bias", dict(request.logit_bias)), ("stop_token_ids", request.stop_ids)):
            if given and not 0 <= min(given) <= max(given) < self.tokens:
                raise ValueError(f"{name}: an id is outside the vocabulary of {self.tokens}")
        ids = self._ids(request)
        if not ids:
            raise ValueError("prompt: must not be empty, because this model uses no bos")
        limit = self.config.max_position_embeddings
        if len(ids) + request.max_tokens > limit:
            raise ContextLengthError(
                f"this model's maximum context length is {limit} tokens, but {len(ids) + request.max_tokens} were "
                f"requested ({len(ids)} in the prompt, {request.max_tokens} in max_tokens)"
            )
        positions = len(ids) + max(request.max_tokens - 1, 0)
        if self.pool.blocks_for(positions) > self.pool.blocks:
            raise ContextLengthError(
                f"the request requires {positions} positions in the cache, which has {self.pool.blocks} blocks of "
                f"{self.pool.block_size}"
            )

    def room(self, prompt: int) -> int:
        """The most ids that may be generated after a prompt of so many ids; less than 1 if there is no room."""
        positions = min(self.config.max_position_embeddings, self.pool.blocks * self.pool.block_size + 1)
        return positions - prompt

    def prompt_tokens(self, request: Request) -> int:
        """Number of ids that the model reads for this prompt, with bos."""
        return len(self._ids(request))

    def submit(self, request: Request, leader: Sequence | None = None) -> Sequence:
        """Queues a request. leader: a sequence with the same prompt, which this one lets read it. Raises the errors of
        `check`; a request with a leader must be valid."""
        if leader is None:
            self.check(request)
        ids = leader.ids[: leader.prompt_length] if leader else self._ids(request)
        text = TextStream(self.vocabulary, request.stop, request.shown)
        grammar = request.grammar.start() if request.grammar else None
        sequence = Sequence(request, ids, len(ids), text, _generator(request), leader, grammar)
        if request.echo:
            # The remaining prompt tokens are added when they are scored. An id without a predecessor has no score.
            unscored = max(0, 1 - (len(ids) - len(request.prompt))) if sequence.scores_prompt else len(request.prompt)
            sequence.prompt_tokens = [Token(index) for index in request.prompt[:unscored]]
        self._scheduler.add(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence and frees its blocks. Does nothing if it has already ended."""
        self._scheduler.remove(sequence)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Runs one step. Returns an empty list if there is nothing to run."""
        chunks = self._scheduler.plan(self._pace.rows)
        started = time.perf_counter()
        if fresh := self.pool.fresh():
            storage = self._cache.storage
            storage.index_fill_(1, torch.tensor(fresh, device=storage.device), 0)
        outputs = list(self._advance(chunks)) if chunks else []
        read = sum(chunk.tokens for chunk in chunks if chunk.tokens > 1)
        self._pace.note(time.perf_counter() - started, read)
        return outputs

    def _advance(self, chunks: tuple[Chunk, ...]) -> Iterator[Output]:
        try:
            spans = [_span(chunk) for chunk in chunks]
            found = self.model.forward(spans, self._cache)
        except Exception as error:
            if len(chunks) == 1:
                yield self._fail(chunks[0].sequence, error)
            else:
                for chunk in chunks:
                    yield from self._advance((chunk,))
            return
        ready: list[tuple[Sequence, int]] = []  # and the row of their last logits
        row = 0
        for chunk, span in zip(chunks, spans, strict=True):
            sequence, first, row = chunk.sequence, row, row + span.wanted
            if -1 in found.best[first:row]:
                yield self._fail(sequence, FloatingPointError("the model's output is not finite (NaN or infinite)"))
                continue
            try:
                _record(chunk, found.logits_WV[first:row, : self.tokens], found.hidden_WD[first:row])
                sequence.seal_blocks(self.pool)
                begun = not sequence.pending and sequence.generated == 0
                delta = sequence.after_prefill() if begun else None
            except Exception as error:
                yield self._fail(sequence, error)
                continue
            if delta:
                yield self._output(sequence, delta)
            if not sequence.pending and sequence.finish_reason is None:
                ready.append((sequence, row - 1))
        if ready:
            yield from self._sample(ready, found.logits_WV, found.best)

    def _sample(self, ready: list[tuple[Sequence, int]], logits_WV: Tensor, best: list[int]) -> Iterator[Output]:
        left = [(one, row) for one, row in ready if best[row] >= self.tokens or not is_greedy(one)]
        drawn = self._draws(left, logits_WV)
        for sequence, row in ready:
            token = drawn.get(sequence) or Token(best[row])
            try:
                if isinstance(token, Exception):
                    raise token
                delta = sequence.accept(token, self.vocabulary.ends)
            except Exception as error:
                yield self._fail(sequence, error)
                continue
            if delta:
                yield self._output(sequence, delta)

    def _draws(self, left: list[tuple[Sequence, int]], logits_WV: Tensor) -> dict[Sequence, Token | Exception]:
        if not left:
            return {}
        try:
            draws = [_draw(one, self.vocabulary.ends) for one, _ in left]
            tokens = sample(logits_WV[[row for _, row in left], : self.tokens], draws)
            return {one: token for (one, _), token in zip(left, tokens, strict=True)}
        except Exception as error:
            if len(left) == 1:
                return {left[0][0]: error}
            return {one: token for pair in left for one, token in self._draws([pair], logits_WV).items()}

    def _output(self, sequence: Sequence, delta: Delta) -> Output:
        if delta.finish_reason is not None:
            self._scheduler.remove(sequence)
        return Output(sequence, delta)

    def _fail(self, sequence: Sequence, error: Exception) -> Output:
        self._scheduler.remove(sequence, forget=True)
        return Output(sequence, error)

    def _ids(self, request: Request) -> list[int]:
        """The prompt with bos, as training documents have; a prompt that starts with bos gets no second one."""
        bos, prompt = self.vocabulary.bos, request.prompt
        return list(prompt) if request.bare or bos is None or prompt[:1] == (bos,) else [bos, *prompt]


def cache_blocks(config: ModelConfig, limits: EngineLimits, element_bytes: int) -> int:
    """Number of cache blocks: enough for `max_running` sequences of full length, limited by `cache_bytes`."""
    width = config.kv_lora_rank + config.qk_rope_head_dim
    block_bytes = config.num_hidden_layers * limits.block_size * width * element_bytes
    most = limits.max_running * -(-config.max_position_embeddings // limits.block_size)
    return max(1, min(most, limits.cache_bytes // block_bytes))


def _span(chunk: Chunk) -> Span:
    sequence = chunk.sequence
    scored = sequence.wants_prompt and sequence.computed < sequence.prompt_length
    wanted = chunk.tokens if scored else int(chunk.end == len(sequence.ids))
    return Span(sequence.ids[sequence.computed : chunk.end], sequence.computed, sequence.blocks, wanted)


def _record(chunk: Chunk, logits_WV: Tensor, hidden_WD: Tensor) -> None:
    """Marks a chunk as computed and, if requested, scores the prompt ids that it predicts, or adds its states up."""
    sequence, begin = chunk.sequence, chunk.sequence.computed
    if sequence.scores_prompt and begin < sequence.prompt_length:
        # The last id of the prompt has no successor. Ids that were scored before are read again after a preemption.
        first = max(begin, sequence.scored)
        following = sequence.ids[first + 1 : min(chunk.end + 1, sequence.prompt_length)]
        if following:
            alternatives = [sequence.request.logprobs or 0] * len(following)
            rows = logits_WV[first - begin : first - begin + len(following)]
            sequence.prompt_tokens += score_tokens(rows, following, alternatives)
            sequence.scored = first + len(following)
    if sequence.request.embed and chunk.end > sequence.scored:
        states_D = hidden_WD[max(begin, sequence.scored) - begin :].float().sum(0)
        sequence.states = states_D if sequence.states is None else sequence.states + states_D
        sequence.scored = chunk.end
    sequence.computed = chunk.end


def _draw(sequence: Sequence, ends: frozenset[int]) -> Draw:
    request, adjust = sequence.request, adjustment(sequence, ends)
    return Draw(
        request.temperature, request.top_p, sequence.generator, request.logprobs, request.top_k, request.min_p, adjust
    )


def _generator(request: Request) -> torch.Generator | None:
    """The request's random generator, on the CPU, so that a seed gives the same result on every device."""
    if request.temperature == 0:
        return None
    seed = secrets.randbits(63) if request.seed is None else request.seed
    return torch.Generator().manual_seed(seed)
