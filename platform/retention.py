"""Which artifacts may go when the store is too large: a decision over names and sizes, touching nothing.

What is pinned, aliased or in use stays, with everything it was made from. Of the rest, an artifact goes only after all
that was made from it, so no artifact ever loses its ancestors; among those that may go next, the oldest goes first.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One artifact: its reference, size in bytes, when it was made, and the references it was made from."""

    reference: str
    bytes: int
    made: float
    inputs: tuple[str, ...] = ()


def lineage(roots: Iterable[str], entries: Mapping[str, Entry]) -> set[str]:
    """`roots` and everything they were made from, as far as it is still there."""
    found: set[str] = set()
    waiting = [root for root in roots if root in entries]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += [name for name in entries[current].inputs if name in entries]
    return found


def to_remove(entries: Sequence[Entry], roots: Iterable[str], limit: int) -> list[Entry]:
    """What to delete, in order, so that at most `limit` bytes remain; less if `roots` hold the rest."""
    known = {entry.reference: entry for entry in entries}
    kept = lineage(roots, known)
    made_from = Counter(name for entry in entries for name in set(entry.inputs) if name in known)
    free = [(e.made, e.reference) for e in entries if e.reference not in kept and not made_from[e.reference]]
    heapq.heapify(free)
    total, chosen = sum(entry.bytes for entry in entries), []
    while total > limit and free:
        entry = known[heapq.heappop(free)[1]]
        chosen.append(entry)
        total -= entry.bytes
        for name in set(entry.inputs) & known.keys():
            made_from[name] -= 1
            if not made_from[name] and name not in kept:
                heapq.heappush(free, (known[name].made, name))
    return chosen
