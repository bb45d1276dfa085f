"""Which sequences run in the next step: continuous batching (Yu et al., Orca, 2022) under a budget of tokens.

Sequences that decode come first, one token each; what is left of the budget goes to prompts, in order of arrival,
a long one in chunks. A waiting sequence is admitted when the cache has blocks for all that it may come to need
(prompt + max_tokens), so a running one is never put off. Only the first in line is looked at: a large request cannot
be passed over for ever by small ones.

Notable: pure bookkeeping, no tensors. The blocks come from whatever hands them out (`LatentCache`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from moray.pipelines.serve.sequence import Sequence


class BlockPool(Protocol):
    """What the scheduler needs of a cache."""

    @property
    def blocks(self) -> int: ...
    @property
    def blocks_free(self) -> int: ...
    def blocks_for(self, tokens: int) -> int: ...
    def allocate(self, count: int) -> list[int]: ...
    def free(self, blocks: list[int]) -> None: ...


@dataclass(frozen=True)
class EngineLimits:
    """step_tokens: ids that one step may run, padding included. max_running: sequences decoded together.

    cache_bytes: most memory for the latent cache; it is smaller where max_running sequences of full length need less.
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
                f"step_tokens = {self.step_tokens} must exceed max_running = {self.max_running}: "
                "prompts get what decoding leaves"
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
    """The queue of the waiting and the list of the running; gives out and takes back their blocks."""

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
        """Takes a sequence out, wherever it is, and frees its blocks; one that is not here is no error."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._cache.free(sequence.blocks)
            sequence.blocks = []
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self) -> Plan:
        """Decides the next step and admits whom it can. Every plan of a busy scheduler runs at least one token."""
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
        """As much of a prompt as fits beside `prefill`, all rows padded to the widest; None if that is nothing."""
        room = budget // (len(prefill) + 1)
        if room < max(widest, 1):
            return None
        return Chunk(sequence, min(sequence.pending, room))

    def _admissible(self) -> bool:
        if not self.waiting or len(self.running) >= self._limits.max_running:
            return False
        return self._cache.blocks_for(self.waiting[0].reserved_positions) <= self._cache.blocks_free

    def _admit(self) -> None:
        sequence = self.waiting.popleft()
        sequence.blocks = self._cache.allocate(self._cache.blocks_for(sequence.reserved_positions))
        self.running.append(sequence)
