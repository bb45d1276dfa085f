"""Scheduling of sequences: continuous batching (Yu et al., Orca, 2022) with a token budget per step.

Each decoding sequence gets one token first. The rest of the budget is used for prompts in order of arrival; long
prompts are split into chunks. A waiting sequence is admitted when the cache has free blocks for its maximum length
(prompt + max_tokens), so a running sequence is never preempted. Only the first waiting sequence is considered, so small
requests cannot starve a large one.

Notable: pure bookkeeping without tensors. A BlockPool (`LatentCache`) allocates the blocks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from moray.pipelines.serve.sequence import Sequence


class BlockPool(Protocol):
    """Interface of the cache for the scheduler."""

    @property
    def blocks(self) -> int: ...
    @property
    def blocks_free(self) -> int: ...
    def blocks_for(self, tokens: int) -> int: ...
    def allocate(self, count: int) -> list[int]: ...
    def free(self, blocks: list[int]) -> None: ...


@dataclass(frozen=True)
class EngineLimits:
    """step_tokens: maximum ids per step, with padding. max_running: maximum sequences that decode together.

    cache_bytes: maximum memory of the latent cache; less if max_running sequences of full length need less.
    """

    step_tokens: int = 512
    max_running: int = 64
    cache_bytes: int = 128 << 20
    block_size: int = 32

    def __post_init__(self) -> None:
        if self.max_running < 1:
            raise ValueError(f"max_running = {self.max_running} must be at least 1")
        if self.step_tokens <= self.max_running:
            raise ValueError(
                f"step_tokens = {self.step_tokens} must exceed max_running = {self.max_running}, because prompts use "
                "the tokens that decoding leaves"
            )


@dataclass(frozen=True)
class Chunk:
    """The next `tokens` ids of a sequence, to be run in this step."""

    sequence: Sequence
    tokens: int

    @property
    def end(self) -> int:
        return self.sequence.computed + self.tokens


@dataclass(frozen=True)
class Plan:
    """One step: prompts (padded to the longest chunk), then one token of each decoding sequence."""

    prefill: tuple[Chunk, ...] = ()
    decode: tuple[Chunk, ...] = ()


class Scheduler:
    """Queue of waiting sequences and list of running ones. Allocates and frees their blocks."""

    def __init__(self, cache: BlockPool, limits: EngineLimits) -> None:
        self._cache = cache
        self._limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Removes a waiting or running sequence and frees its blocks. Does nothing for other sequences."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._cache.free(sequence.blocks)
            sequence.blocks = []
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self) -> Plan:
        """Plans the next step and admits waiting sequences. A busy scheduler's plan runs at least one token."""
        decode = tuple(Chunk(sequence, 1) for sequence in self.running if not sequence.prefilling)
        prefill: list[Chunk] = []
        budget = self._limits.step_tokens - len(decode)
        widest = 0
        for sequence in [s for s in self.running if s.prefilling]:
            if not (chunk := self._chunk(sequence, prefill, widest, budget)):
                break
            prefill.append(chunk)
            widest = max(widest, chunk.tokens)
        while self._admissible() and (chunk := self._chunk(self.waiting[0], prefill, widest, budget)):
            self._admit()
            prefill.append(chunk)
            widest = max(widest, chunk.tokens)
        return Plan(tuple(prefill), decode)

    def _chunk(self, sequence: Sequence, prefill: list[Chunk], widest: int, budget: int) -> Chunk | None:
        """The largest chunk of a prompt that fits beside `prefill`, with all rows padded to the widest; None if none
        fits."""
        available = budget // (len(prefill) + 1)
        if available < max(widest, 1):
            return None
        return Chunk(sequence, min(sequence.pending, available))

    def _admissible(self) -> bool:
        if not self.waiting or len(self.running) >= self._limits.max_running:
            return False
        return self._cache.blocks_for(self.waiting[0].reserved_positions) <= self._cache.blocks_free

    def _admit(self) -> None:
        sequence = self.waiting.popleft()
        sequence.blocks = self._cache.allocate(self._cache.blocks_for(sequence.reserved_positions))
        self.running.append(sequence)
