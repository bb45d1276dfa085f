"""Scheduling of sequences: continuous batching (Yu et al., Orca, 2022) with a budget of rows per step.

A step runs rows: one of each sequence that decodes, and chunks of prompts. Sequences take turns by the rows they have
had: a turn is 16 decoded ids, or 128 ids of a prompt. With more sequences than `max_running`, each decodes 16 ids, then
the next ones do. A clock counts what a sequence has had that always got its fair share (the virtual time of Parekh and
Gallager, 1993), and a new sequence begins at the clock's turn. So nobody waits for others to end, and none of those who
are here waits for those who keep arriving. Tenants take turns in the same way (`tenants.py`).

Blocks of the cache are taken as they are needed. If none is free, the sequence that would be served last gives up its
own and reads its ids again when its turn comes. Whoever has no block yet takes only free ones, unless it has waited for
`_PATIENCE` steps.

Sequences that do not fit together must not read their ids in turn and never decode. So whoever takes its first blocks
keeps them until it has decoded a turn, or, if that is more, as many ids as reading counts for. Until then only those
who took theirs earlier may have them; the earliest always gets on. A small request that has waited for `_PATIENCE`
steps takes the few blocks that it needs from the end of the longest sequence, whatever that one is at.

Notable: pure bookkeeping without tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from moray.pipelines.serve.block_pool import BlockPool
from moray.pipelines.serve.sequence import PROMPT_SHARE, Sequence
from moray.pipelines.serve.tenants import Tenants

_TURN = 16  # decoded ids
_PATIENCE = 64  # steps
_SMALL_SHARE = 16  # a small request needs at most this part of all blocks


@dataclass(frozen=True)
class EngineLimits:
    """step_tokens: maximum rows per step. max_running: maximum sequences that decode in one step.

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
                "the rows that decoding leaves"
            )


class Chunk(NamedTuple):
    """The next `tokens` ids of a sequence, to be run in this step."""

    sequence: Sequence
    tokens: int

    @property
    def end(self) -> int:
        return self.sequence.computed + self.tokens


class Scheduler:
    """The open sequences, and their blocks."""

    def __init__(self, pool: BlockPool, limits: EngineLimits) -> None:
        self._pool = pool
        self._limits = limits
        self._open: dict[Sequence, None] = {}  # in order of arrival
        self._clock = 0.0
        self._tenants = Tenants()
        self._starts = 0
        self.running: tuple[Sequence, ...] = ()  # in the last step

    @property
    def busy(self) -> bool:
        return bool(self._open)

    @property
    def sequences(self) -> list[Sequence]:
        """All open sequences, in order of arrival."""
        return list(self._open)

    def add(self, sequence: Sequence) -> None:
        sequence.served = max(self._clock, min((one.served for one in self._open), default=0.0))
        self._open[sequence] = None

    def remove(self, sequence: Sequence, forget: bool = False) -> None:
        """Removes a sequence and releases its blocks. Does nothing for one that is not open. forget: its blocks'
        contents must not be used again."""
        if sequence in self._open:
            del self._open[sequence]
            sequence.closed = True
            self._release(sequence, forget)
            self.running = tuple(one for one in self.running if one is not sequence)

    def plan(self, prompt_rows: int | None = None) -> tuple[Chunk, ...]:
        """The chunks of the next step; at least one if a sequence is open.

        prompt_rows: at most so many rows of prompts, beside sequences that decode.
        """
        order = self._tenants.order(sorted(self._open, key=lambda one: one.served // _TURN))  # stable: then by arrival
        reading = {one for one in order if one.reading}
        decoding = min(self._limits.max_running, len(order) - len(reading))
        left = self._limits.step_tokens - decoding
        if decoding and prompt_rows is not None:
            left = min(left, prompt_rows)
        chunks: list[Chunk] = []
        for one in order:
            if len(chunks) == self._limits.max_running:
                break
            decodes = one not in reading and one.blocks  # an earlier one may have taken its blocks
            if decodes:
                chunk = self._chunk(one, 1, order, chunks)
            elif left > 0 and not one.waits:
                chunk = self._chunk(one, left, order, chunks)
            else:
                continue
            one.waited += 1
            if chunk is not None:
                chunks.append(chunk)
                left -= 0 if decodes else chunk.tokens
                one.waited = 0
                served = 1 if decodes else chunk.tokens / PROMPT_SHARE
                one.served += served
                self._tenants.serve(one.request.tenant, served)
                self._clock += served / len(order)
        self.running = tuple(chunk.sequence for chunk in chunks)
        return tuple(chunks)

    def _chunk(self, one: Sequence, rows: int, order: list[Sequence], chunks: list[Chunk]) -> Chunk | None:
        """The next rows of a sequence, with blocks for them; None if there is no block."""
        if not one.blocks:
            one.find_blocks(self._pool)
            whole = self._pool.blocks_for(len(one.ids) + 1) - len(one.blocks)
            if whole > self._pool.blocks_free and one.waited < _PATIENCE and chunks:
                self._release(one)
                return None  # it would lose what it reads to those who are here
            self._starts += 1
            one.since, one.goal = self._starts, one.generated + max(_TURN, int(one.pending / PROMPT_SHARE))
        tokens = min(one.pending, rows)
        needed = self._pool.blocks_for(one.computed + tokens) - len(one.blocks)
        if needed > self._pool.blocks_free and (one.blocks or one.waited >= _PATIENCE or not chunks):
            self._preempt(needed, one, order, chunks)
        free = self._pool.blocks_free
        if needed > free:
            needed, tokens = free, (len(one.blocks) + free) * self._pool.block_size - one.computed
        if tokens <= 0:
            if not one.computed:
                self._release(one)
            return None
        if needed > 0:
            one.blocks += self._pool.take(needed)
        return Chunk(one, tokens)

    def _preempt(self, needed: int, one: Sequence, order: list[Sequence], chunks: Iterable[Chunk]) -> None:
        """Takes the blocks of those who would be served last, as far as they may lose them."""
        kept = {chunk.sequence for chunk in chunks} | {one}
        for victim in reversed(order):
            if self._pool.blocks_free >= needed:
                return
            if victim.blocks and victim not in kept and (not _keeps(victim) or _is_before(one, victim)):
                self._release(victim)
        whole = self._pool.blocks_for(len(one.ids) + _TURN)
        if one.waited >= _PATIENCE and whole * _SMALL_SHARE <= self._pool.blocks:
            self._shorten(needed, [victim for victim in order if victim not in kept])

    def _shorten(self, needed: int, others: Iterable[Sequence]) -> None:
        """Takes the last blocks of the longest sequence."""
        longest = max(others, key=lambda other: len(other.blocks), default=None)
        while longest is not None and longest.blocks and self._pool.blocks_free < needed:
            self._pool.release(longest.blocks[-1:])
            longest.lose_blocks(len(longest.blocks) - 1, self._pool.block_size)

    def _release(self, sequence: Sequence, forget: bool = False) -> None:
        self._pool.release(sequence.blocks, forget)
        sequence.lose_blocks()


def _keeps(one: Sequence) -> bool:
    """Whether a sequence has not yet decoded what it took its blocks for."""
    return bool(one.blocks) and one.generated < one.goal


def _is_before(one: Sequence, other: Sequence) -> bool:
    """Whether a sequence that keeps its blocks took its first ones before another did."""
    return _keeps(one) and one.since < other.since
