"""Number of sequences in each step's global batch: constant, or a ramp."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class BatchPlan:
    """Batches have `sizes[i]` sequences from step `starts[i]`; `starts` ascends from 0."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.starts) != len(self.sizes) or self.starts[0] != 0 or min(self.sizes) < 1:
            raise ValueError(f"invalid batch plan: sizes {self.sizes} from steps {self.starts}")
        if any(before >= after for before, after in pairwise(self.starts)):
            raise ValueError(f"the steps of a batch plan must ascend: {self.starts}")

    @classmethod
    def constant(cls, size: int) -> BatchPlan:
        return cls((0,), (size,))

    def size(self, step: int) -> int:
        """Sequences in the batch of `step`."""
        return self.sizes[bisect_right(self.starts, step) - 1]

    def before(self, step: int) -> int:
        """Sequences in all batches before `step`."""
        return sum(size * steps for size, steps in self.parts(step))

    def parts(self, step: int) -> list[tuple[int, int]]:
        """(size, number of steps) of each part of the plan before `step`, in order. The last part is the one that
        contains `step`; its number of steps may be 0."""
        last = bisect_right(self.starts, step)
        ends = (*self.starts[1:last], step)
        return [
            (size, end - start) for size, start, end in zip(self.sizes[:last], self.starts[:last], ends, strict=True)
        ]
