"""Decides which artifacts to remove when the store exceeds its limit: pure functions over names and sizes.

Pinned, aliased and active artifacts are kept, with all their ancestors. Of the rest, an artifact is removed only after
everything made from it, so no artifact ever loses its ancestors; among the candidates, the oldest is removed first.
Local copies of artifacts in a shared root are removed before anything else, in any order of lineage, because nothing
is lost.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One artifact: its reference, size in bytes, creation time, and the references of its inputs."""

    reference: str
    bytes: int
    made: float
    inputs: tuple[str, ...] = ()
    copied: bool = False  # the shared root has it too


def lineage(roots: Iterable[str], entries: Mapping[str, Entry]) -> set[str]:
    """Returns `roots` and all their ancestors that still exist."""
    found: set[str] = set()
    waiting = [root for root in roots if root in entries]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += [name for name in entries[current].inputs if name in entries]
    return found


def to_free(entries: Sequence[Entry], roots: Iterable[str], limit: int) -> list[Entry]:
    """Returns the local copies of shared artifacts to delete, oldest first, so that at most `limit` bytes remain.

    roots: artifacts that must stay on this machine, with all their ancestors: pinned and active ones.
    """
    kept = lineage(roots, {entry.reference: entry for entry in entries})
    total, chosen = sum(entry.bytes for entry in entries), []
    for entry in sorted(entries, key=lambda e: (e.made, e.reference)):
        if total > limit and entry.copied and entry.reference not in kept:
            chosen.append(entry)
            total -= entry.bytes
    return chosen


def to_remove(entries: Sequence[Entry], roots: Iterable[str], limit: int) -> list[Entry]:
    """Returns the artifacts to delete permanently, in order, so that at most `limit` bytes remain. Deletes fewer if
    `roots` need the rest."""
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
