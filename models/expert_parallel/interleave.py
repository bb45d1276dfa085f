"""Interleaves micro-batches: a generator yields after it has started an exchange and before it waits for it.

While one waits, the others compute. A single one continues without waiting for others.

Notable: autograd runs the backward pass in the reverse order of the forward pass, also across losses that are added up.
So computation between a start and its wait in the forward pass is also between them in the backward pass, and one
schedule serves both. (Among ready nodes, torch's engine takes the one created last.)
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Parts = Generator[None, None, T]


def run_alone(work: Parts[T]) -> T:
    """Runs one generator to its end; returns its value."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            value: T = end.value
            return value


def interleave(works: Sequence[Parts[T]]) -> list[T]:
    """Runs the generators round-robin, one part at a time, until all have ended; returns their values."""
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
