"""Work in parts: a generator that yields whenever it has set rows on their way and would have to wait for them.

Several of them, in turn, work in each other's waits. Whoever is alone just goes on.

Notable: autograd runs a backward in the reverse of the order in which the forward ran, also across losses that are
added up. So what lies between a departure and an arrival in the forward lies between them in the backward too, and one
schedule serves both (torch's engine takes, of the nodes that are ready, the one that was made last).
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Parts = Generator[None, None, T]


def alone(work: Parts[T]) -> T:
    """Does it all; what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            value: T = end.value
            return value


def in_turn(works: Sequence[Parts[T]]) -> list[T]:
    """Does a part of each in turn until all are done; what they return."""
    results: dict[int, T] = {}
    while len(results) < len(works):
        for number, work in enumerate(works):
            if number in results:
                continue
            try:
                next(work)
            except StopIteration as end:
                results[number] = end.value
    return [results[number] for number in range(len(works))]
