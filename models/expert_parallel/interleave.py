"""Interleaves micro-batches: a generator yields after it has started an exchange and before it waits for it.

While one waits, the others compute. A single one continues without waiting for others. A generator may also yield a
`Together`: work that is done at once for all of them, such as a layer that the backward recomputes (`whole_layer.py`).

Notable: autograd runs the backward pass in the reverse order of the forward pass, also across losses that are added up.
So computation between a start and its wait in the forward pass is also between them in the backward pass, and one
schedule serves both. (Among ready nodes, torch's engine takes the one created last.)
"""

from collections.abc import Generator, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Together(Protocol):
    """Work that all generators reach. The result of each is sent to it."""

    def run(self, all_: Sequence[Any]) -> Sequence[Any]:
        """Does the work of all generators, whose requests are given in their order; returns the result of each."""


Parts = Generator[Together | None, Any, T]


def run_alone(work: Parts[T]) -> T:
    """Runs one generator to its end; returns its value."""
    return interleave([work])[0]


def interleave(works: Sequence[Parts[T]]) -> list[T]:
    """Runs the generators round-robin, one part at a time, until all have ended; returns their values."""
    results: dict[int, T] = {}
    requests: dict[int, Together] = {}
    answers: dict[int, Any] = {}
    while len(results) < len(works):
        for number, work in enumerate(works):
            if number in results or number in requests:
                continue
            try:
                request = work.send(answers.pop(number, None))
            except StopIteration as end:
                results[number] = end.value
                continue
            if request is not None:
                requests[number] = request
        if requests and len(requests) + len(results) == len(works):
            (first, *_), together = requests.values(), list(requests.values())
            answers = dict(zip(requests, first.run(together), strict=True))
            requests = {}
    return [results[number] for number in range(len(works))]
