"""Micro-batches in turn: a generator yields after it has started an exchange and before it waits for it.

While one waits, the others compute. A single one just continues.

Notable: autograd runs the backward pass in the reverse order of the forward pass, also across losses that are added up.
So what runs between a start and its wait in the forward pass does so in the backward pass too, and one schedule serves
both (torch's engine takes, of the nodes that are ready, the one that was made last).
"""

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Parts = Generator[None, None, T]


def run_alone(work: Parts[T]) -> T:
    """Does it all; what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            value: T = end.value
            return value


def interleave(works: Sequence[Parts[T]]) -> list[T]:
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
