"""The inference engine: runs many requests concurrently on one model and one latent cache.

`step()` runs the scheduler's plan (prompts, then one token of each decoding sequence) and returns the delta of each
answer. It is plain synchronous Python: `async_engine.py` calls it from a thread, tests and benchmarks call it directly.

Notable: an error ends only its own request. A failed batch is repeated one sequence at a time, which is safe because
rewriting a latent gives the same latent, and only the failing sequence ends with the error.

Shapes: B sequences, T ids of each in this step, N blocks of a table, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moray.models.cache import LatentCache
from moray.models.config import ModelConfig
from moray.models.model import DeepseekV3
from moray.pipelines.serve.detokenizer import ServingVocabulary, TextStream, Token
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
    """Runs requests on a model (in eval mode, on its own device). Not thread-safe."""

    def __init__(self, model: DeepseekV3, vocabulary: ServingVocabulary, limits: EngineLimits | None = None) -> None:
        limits = limits or EngineLimits()
        self.model = model
        self.config = model.config
        self.vocabulary = vocabulary
        # The last rows of a padded vocabulary are not tokens.
        named = max(len(vocabulary.pieces), max(vocabulary.ends, default=-1) + 1)
        self._tokens = min(named, model.config.vocab_size)
        # Bytes of the longest text that fits into the context.
        self.longest_text = model.config.max_position_embeddings * vocabulary.longest_piece
        weight = model.lm_head.weight
        self._device = weight.device
        blocks = cache_blocks(model.config, limits, weight.element_size())
        self.cache = LatentCache(model.config, blocks, limits.block_size, weight.dtype, weight.device)
        self._scheduler = Scheduler(self.cache, limits)

    @property
    def busy(self) -> bool:
        return self._scheduler.busy

    @property
    def running(self) -> list[Sequence]:
        return self._scheduler.running

    @property
    def waiting(self) -> Collection[Sequence]:
        return self._scheduler.waiting

    def expert_load(self) -> tuple[float, ...]:
        """By MoE layer: rows of the most loaded expert over the mean, since the start; 0 before the first row."""
        loads = [shard.load_E.tolist() for shard in self.model.shards()]
        return tuple(round(max(load) * len(load) / sum(load), 3) if sum(load) else 0.0 for load in loads)

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences that are waiting or running."""
        return [*self._scheduler.running, *self._scheduler.waiting]

    def check(self, request: Request) -> None:
        """Raises ValueError for an invalid request, ContextLengthError for one that is too long."""
        for index in (min(request.prompt), max(request.prompt)) if request.prompt else ():
            if not 0 <= index < self._tokens:
                raise ValueError(f"prompt: id {index} is outside the vocabulary of {self._tokens}")
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
        if self.cache.blocks_for(positions) > self.cache.blocks:
            raise ContextLengthError(
                f"the request requires {positions} positions in the cache, which has {self.cache.blocks} blocks of "
                f"{self.cache.block_size}"
            )

    def prompt_tokens(self, request: Request) -> int:
        """Number of ids that the model reads for this prompt, with bos."""
        return len(self._ids(request))

    def submit(self, request: Request) -> Sequence:
        """Queues a request. Raises the errors of `check`."""
        self.check(request)
        ids = self._ids(request)
        sequence = Sequence(
            request, ids, len(ids), TextStream(self.vocabulary, request.stop), _generator(request, self._device)
        )
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
        plan = self._scheduler.plan()
        return [output for chunks in (plan.prefill, plan.decode) if chunks for output in self._advance(chunks)]

    def _advance(self, chunks: tuple[Chunk, ...]) -> Iterator[Output]:
        try:
            logits_BTV = self._forward(chunks)
        except Exception as error:
            if len(chunks) == 1:
                yield self._fail(chunks[0].sequence, error)
            else:
                for chunk in chunks:
                    yield from self._advance((chunk,))
            return
        last_BV = logits_BTV[:, -1]
        ready: list[int] = []
        for row, finite in enumerate(last_BV.isfinite().all(-1).tolist()):
            sequence = chunks[row].sequence
            if not finite:
                yield self._fail(sequence, FloatingPointError("the model's output is not finite (NaN or infinite)"))
                continue
            _record(chunks[row], logits_BTV[row])
            if sequence.prefilling:
                continue
            if sequence.generated == 0 and (delta := sequence.after_prefill()):
                yield self._output(sequence, delta)
            if sequence.finish_reason is None:
                ready.append(row)
        if ready:
            yield from self._sample([chunks[row].sequence for row in ready], last_BV[ready])

    def _sample(self, sequences: list[Sequence], logits_BV: Tensor) -> Iterator[Output]:
        tokens = sample(logits_BV, [_draw(sequence) for sequence in sequences])
        for sequence, token in zip(sequences, tokens, strict=True):
            try:
                delta = sequence.accept(token, self.vocabulary.ends)
            except Exception as error:
                yield self._fail(sequence, error)
                continue
            if delta:
                yield self._output(sequence, delta)

    def _forward(self, chunks: tuple[Chunk, ...]) -> Tensor:
        """FP32 logits of the chunks: [B, T, V] if a prompt is to be scored, else only of the last ids, [B, 1, V].

        Rows are padded on the left, so that the last column has the last id of each sequence.
        """
        width = max(chunk.tokens for chunk in chunks)
        depth = max(self.cache.blocks_for(chunk.end) for chunk in chunks)
        ids, positions, tables = [], [], []
        for chunk in chunks:
            start, padding = chunk.sequence.computed, width - chunk.tokens
            table = chunk.sequence.blocks[:depth]
            ids.append([0] * padding + chunk.sequence.ids[start : chunk.end])
            positions.append([-1] * padding + list(range(start, chunk.end)))
            tables.append(table + [-1] * (depth - len(table)))
        logits: Tensor = self.model.forward_cached(
            self._tensor(ids),
            self._tensor(positions),
            self.cache,
            self._tensor(tables),
            last_only=not any(chunk.sequence.scores_prompt and chunk.sequence.prefilling for chunk in chunks),
        )
        logits = logits[..., : self._tokens]
        return logits.float() if logits.dtype != torch.float64 else logits

    def _output(self, sequence: Sequence, delta: Delta) -> Output:
        if delta.finish_reason is not None:
            self._scheduler.remove(sequence)
        return Output(sequence, delta)

    def _fail(self, sequence: Sequence, error: Exception) -> Output:
        self._scheduler.remove(sequence)
        return Output(sequence, error)

    def _ids(self, request: Request) -> list[int]:
        """The prompt with bos, as training documents have; a prompt that starts with bos gets no second one."""
        bos, prompt = self.vocabulary.bos, request.prompt
        return list(prompt) if request.bare or bos is None or prompt[:1] == (bos,) else [bos, *prompt]

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self._device)


def cache_blocks(config: ModelConfig, limits: EngineLimits, element_bytes: int) -> int:
    """Number of cache blocks: enough for `max_running` sequences of full length, limited by `cache_bytes`."""
    width = config.kv_lora_rank + config.qk_rope_head_dim
    block_bytes = config.num_hidden_layers * limits.block_size * width * element_bytes
    most = limits.max_running * -(-config.max_position_embeddings // limits.block_size)
    return max(1, min(most, limits.cache_bytes // block_bytes))


def _record(chunk: Chunk, logits_TV: Tensor) -> None:
    """Marks a chunk as computed and, if requested, scores the prompt ids that it predicts."""
    sequence = chunk.sequence
    if sequence.scores_prompt and sequence.prefilling:
        following = sequence.ids[sequence.computed + 1 : chunk.end + 1]  # the last id of the prompt has no successor
        if following:
            first = logits_TV.shape[0] - chunk.tokens
            alternatives = [sequence.request.logprobs or 0] * len(following)
            sequence.prompt_tokens += score_tokens(logits_TV[first : first + len(following)], following, alternatives)
    sequence.computed = chunk.end


def _draw(sequence: Sequence) -> Draw:
    request = sequence.request
    return Draw(request.temperature, request.top_p, sequence.generator, request.logprobs)


def _generator(request: Request, device: torch.device) -> torch.Generator | None:
    """The request's random generator, on the CPU, so that a seed gives the same result on every device."""
    if request.temperature == 0:
        return None
    seed = secrets.randbits(63) if request.seed is None else request.seed
    return torch.Generator().manual_seed(seed)
