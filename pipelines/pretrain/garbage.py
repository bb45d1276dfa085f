"""Python's garbage collection, by all ranks at the same steps.

An automatic collection stops one rank, and all others wait for it at the next collective. The more ranks, the more
often one of them collects.

Tensors of a step are in no reference cycles, so reference counts free them without a collection. A test checks this.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


class StepCollector:
    """Collects after every `every` steps."""

    def __init__(self, every: int) -> None:
        self._every = every

    def after(self, steps: int) -> None:
        """Must be called on all ranks after their step number `steps`, counted from 1."""
        if steps % self._every == 0:
            self.now()

    def now(self) -> None:
        """Must be called on all ranks at the same point: after a checkpoint was loaded, whose copies of tensors may be
        in cycles."""
        gc.collect()


@contextmanager
def collected_by_steps(every: int) -> Iterator[StepCollector]:
    """Turns automatic collection off within the block. Objects that exist at its start, such as modules, are left out
    of collections, so that these are short."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield StepCollector(every)
    finally:
        gc.enable()
        gc.unfreeze()
