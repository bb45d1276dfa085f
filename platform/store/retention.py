"""Which artifacts may go when the store is too large: a decision over names and sizes, touching nothing.

What is pinned, aliased or in use stays, with everything it was made from. Of the rest, an artifact goes only after all
that was made from it, so no artifact ever loses its ancestors; among those that may go next, the oldest goes first.
What also lies in a shared root goes before all else, in any order of lineage: freeing a copy loses nothing.
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
    copied: bool = False  # it also lies in the shared root


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


def to_free(entries: Sequence[Entry], roots: Iterable[str], limit: int) -> list[Entry]:
    """Which copies of what lies in a shared root to delete, oldest first, so that at most `limit` bytes remain.

    roots: what must stay on this machine, with all it was made from: pins, and what runs use.
    """
    kept = lineage(roots, {entry.reference: entry for entry in entries})
    total, chosen = sum(entry.bytes for entry in entries), []
    for entry in sorted(entries, key=lambda e: (e.made, e.reference)):
        if total > limit and entry.copied and entry.reference not in kept:
            chosen.append(entry)
            total -= entry.bytes
    return chosen


def to_remove(entries: Sequence[Entry], roots: Iterable[str], limit: int) -> list[Entry]:
    """What to delete for good, in order, so that at most `limit` bytes remain; less if `roots` hold the rest."""
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
