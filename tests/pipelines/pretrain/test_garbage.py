"""Collection of garbage by steps."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from moray.pipelines.pretrain.garbage import collected_by_steps
from tests.pipelines.pretrain.training_ranks import left_in_cycles
from tests.ranks import RankPool


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_garbage_is_collected_after_every_nth_step_only() -> None:
    with collected_by_steps(3) as garbage:
        assert not gc.isenabled()
        alive = []
        for step in range(1, 7):
            cycle = weakref.ref(Cycle())
            garbage.after(step)
            alive.append(cycle() is not None)
    assert alive == [True, True, False, True, True, False]
    assert gc.isenabled()
    assert not gc.get_freeze_count()


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, {"recompute": "layer"}),
        (2, {"expert_parallel": 2, "micro_batch_sequences": 1}),
        (2, {"expert_parallel": 2, "zero_stage": 3, "precision": "fp8", "recompute": "v3"}),
        (4, {"expert_parallel": 4, "zero_stage": 3, "node_ranks": 2, "micro_batch_sequences": 1}),
    ],
)
def test_a_step_leaves_no_tensor_in_a_reference_cycle(ranks: RankPool, world: int, settings: dict[str, Any]) -> None:
    """Else memory of the device would be freed only by the next collection, dozens of steps later."""
    assert ranks.run(world, left_in_cycles, settings) == [[]] * world
