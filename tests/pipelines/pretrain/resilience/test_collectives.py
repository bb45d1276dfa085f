"""The checker of the order of collectives, and the order of training's collectives."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.pretrain.resilience.collectives import Collective, check_order
from tests.pipelines.pretrain.training_ranks import collectives
from tests.ranks import RankPool

WORLD = 4
groups = st.sets(st.integers(0, WORLD - 1), min_size=1).map(lambda ranks: tuple(sorted(ranks)))
schedules = st.lists(st.builds(Collective, st.sampled_from(["allreduce", "alltoall"]), groups, st.just(1)), max_size=20)


def traces(schedule: list[Collective]) -> list[list[Collective]]:
    return [[collective for collective in schedule if rank in collective.ranks] for rank in range(WORLD)]


@given(schedules)
def test_a_common_order_is_accepted(schedule: list[Collective]) -> None:
    check_order(traces(schedule))


@given(schedules, st.data())
def test_a_rank_that_swaps_two_is_found(schedule: list[Collective], data: st.DataObject) -> None:
    """Two different collectives with a second rank in common, which issues them in reverse order."""
    issued = traces(schedule)
    swaps = [
        (rank, at)
        for rank, trace in enumerate(issued)
        for at, (one, two) in enumerate(itertools.pairwise(trace))
        if one != two and len(set(one.ranks) & set(two.ranks)) > 1
    ]
    if swaps:
        rank, at = data.draw(st.sampled_from(swaps))
        issued[rank][at : at + 2] = reversed(issued[rank][at : at + 2])
        with pytest.raises(ValueError, match=r"no consistent order|number \d+ of ranks"):
            check_order(issued)


def test_a_cycle_of_three_groups_is_found() -> None:
    """No two ranks disagree on two collectives, and yet each waits for the next."""
    a, b, c = (Collective("allreduce", ranks, 1) for ranks in ((0, 1), (1, 2), (0, 2)))
    with pytest.raises(ValueError, match="no consistent order"):
        check_order([[a, c], [b, a], [c, b]])
    check_order([[a, c], [a, b], [b, c]])


def test_a_missing_collective_a_foreign_one_and_another_size_are_found() -> None:
    sums = Collective("allreduce", (0, 1), 8)
    with pytest.raises(ValueError, match="2 collectives on rank 0, 1 on 1"):
        check_order([[sums, sums], [sums]])
    with pytest.raises(ValueError, match="of 8 elements on rank 0, allreduce of 9 on rank 1"):
        check_order([[sums], [Collective("allreduce", (0, 1), 9)]])
    with pytest.raises(ValueError, match="is not in its group"):
        check_order([[], [], [sums]])


@pytest.mark.parametrize(
    "settings",
    [
        {"expert_parallel": 2},
        {"expert_parallel": 2, "zero_stage": 1, "recompute": "v3", "micro_batch_sequences": 1},
        {"expert_parallel": 4, "zero_stage": 2, "precision": "fp8", "moments": "fp8"},
    ],
)
def test_training_issues_its_collectives_in_one_order(
    ranks: RankPool, settings: dict[str, Any], tmp_path: Path
) -> None:
    issued = ranks.run(WORLD, collectives, {"folder": str(tmp_path), **settings})
    assert all(any(c.operation.startswith("alltoall") for c in trace) for trace in issued)
    check_order(issued)
