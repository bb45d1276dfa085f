"""What a step would need of its devices' memory: a request, and a step's answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Progress = Callable[[str], None]


@dataclass(frozen=True)
class MemoryRequest:
    """world: ranks, by default the recipe's. gpu: a name of `GPUS`. imbalance: rows at the busiest rank's experts over
    the mean. step: the only step to plan, by its key in the recipe."""

    gpu: str
    world: int | None = None
    imbalance: float = 1.0
    step: str | None = None


@dataclass(frozen=True)
class MemoryChange:
    """A change of the recipe, as `field: value`, and the bytes that a rank needs with it."""

    text: str
    bytes: int


@dataclass(frozen=True)
class StepMemoryPlan:
    """The memory of one rank of a step, in bytes.

    device, host: by part, at the moment of the largest sum. largest: each part's own largest on the device. capacity:
    what the device has. reads: places where the host waits for the device in one step, with their number.
    changes: that would make it fit, cheapest first, if it does not.
    """

    step: str
    world: int
    gpu: str
    capacity: int
    device: Mapping[str, int]
    largest: Mapping[str, int]
    host: Mapping[str, int]
    reads: Mapping[str, int]
    changes: tuple[MemoryChange, ...] = field(default=())

    @property
    def needed(self) -> int:
        return sum(self.device.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity
