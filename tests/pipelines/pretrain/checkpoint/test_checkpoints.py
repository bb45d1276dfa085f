"""Checkpoints do not depend on the layout that writes or reads them. Real gloo process groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pipelines.pretrain.training_ranks import (
    LENGTH,
    SEQUENCES,
    Arrays,
    Read,
    Trace,
    logical,
    restore,
    resume,
    save_after,
)
from tests.ranks import RankPool

COUNT = 3  # steps before the save
ZERO1, ZERO2, ZERO3 = ({"zero_stage": stage} for stage in (1, 2, 3))
# (EP, EDP, settings): every one loads what every other saved, and its own: 9 pairs in a test, 2 * 100 as evidence.
Topology = tuple[int, int, dict[str, Any]]
SHORT: list[Topology] = [(1, 1, {}), (2, 2, ZERO3), (4, 1, {**ZERO1, "offload": True})]
ALL: list[Topology] = [
    *SHORT,
    (1, 1, ZERO1),
    (1, 2, ZERO1),
    (2, 1, {}),
    (1, 4, ZERO2),
    (1, 4, {**ZERO3, "shard_ranks": 2}),
    (4, 1, ZERO3),
    (2, 2, {**ZERO3, "expert_zero_stage": 1, "recompute": "layer"}),
]


class Saved:
    """A checkpoint of each topology, with moments in one format."""

    def __init__(self, ranks: RankPool, folder: Path, moments: str, topologies: list[Topology]) -> None:
        self.ranks = ranks
        self.moments = moments
        self.topologies = topologies
        self.folders = [str(folder / str(number)) for number in range(len(topologies))]
        self.traces = [
            ranks.run(ep * edp, save_after, self.folders[number], COUNT, self.settings(ep, settings))
            for number, (ep, edp, settings) in enumerate(topologies)
        ]

    def settings(self, ep: int, settings: dict[str, Any]) -> dict[str, Any]:
        return {"expert_parallel": ep, "moments": self.moments, **settings}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("fp8", SHORT), id="short"),
        pytest.param(("fp8", ALL), id="fp8", marks=pytest.mark.evidence),
        pytest.param(("float32", ALL), id="float32", marks=pytest.mark.evidence),
    ],
)
def saved(request: pytest.FixtureRequest, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(ranks, tmp_path_factory.mktemp("checkpoints"), *request.param)


def assert_equal(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_any_topology_loads_the_checkpoint_of_any_other_to_the_bit(saved: Saved) -> None:
    """Elsewhere, only one rank's experts were saved (verl #2086), or moments were lost on load (AReaL #1468)."""
    states = [logical([trace.state for trace in traces]) for traces in saved.traces]
    for ep, edp, settings in saved.topologies:
        by_rank: list[list[Read]] = saved.ranks.run(ep * edp, restore, saved.folders, saved.settings(ep, settings))
        for writer, state in enumerate(states):
            found = [restored[writer] for restored in by_rank]
            assert_equal(logical([one.state for one in found]), state)
            for one in found:
                assert one.position == (COUNT, COUNT * SEQUENCES * LENGTH)
                assert_equal(one.biases, saved.traces[writer][0].biases)
                for name, weight in one.weights.items():
                    np.testing.assert_array_equal(weight.ravel(), state[f"master/{name}"], err_msg=name)


def test_router_biases_are_saved(saved: Saved) -> None:
    """FlagScale #411."""
    assert all(bias_E.any() for bias_E in saved.traces[0][0].biases.values())


def test_training_resumes_with_identical_losses(saved: Saved) -> None:
    for number, (ep, edp, settings) in enumerate(saved.topologies):
        losses = saved.ranks.run(ep * edp, resume, saved.folders[number], COUNT, saved.settings(ep, settings))
        uninterrupted: list[Trace] = saved.traces[number]
        assert losses == [trace.losses for trace in uninterrupted], saved.topologies[number]


def test_another_topology_resumes_with_the_same_losses(saved: Saved) -> None:
    alone = saved.traces[0][0].losses
    for ep, edp, settings in saved.topologies[1:]:
        losses = saved.ranks.run(ep * edp, resume, saved.folders[0], COUNT, saved.settings(ep, settings))
        np.testing.assert_allclose(losses[0], alone, rtol=1e-4, err_msg=f"{ep} {edp} {settings}")
