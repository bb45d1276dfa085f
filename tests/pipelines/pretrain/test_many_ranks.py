"""Layouts of eight and sixteen ranks. Real gloo process groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pipelines.pretrain.test_layouts import off, whole
from tests.pipelines.pretrain.training_ranks import resume, save_after, train, train_one_expert
from tests.ranks import RankPool

pytestmark = pytest.mark.evidence
EXPERTS = 16
EXACT = {"precision": "float64", "experts": EXPERTS}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


@pytest.mark.parametrize("job", [train, train_one_expert])
@pytest.mark.parametrize(
    ("ep", "edp", "settings"),
    [
        (8, 1, {}),
        (4, 2, {"zero_stage": 3, "micro_batch_sequences": 1}),
        (2, 4, {"zero_stage": 3, "shard_ranks": 2, "expert_zero_stage": 2}),
        (1, 8, {"zero_stage": 2}),
        (16, 1, {"zero_stage": 1}),  # eight sequences: none on eight of the ranks
        (8, 2, {"zero_stage": 3, "recompute": "layer", "batch_sequences": 20, "micro_batch_sequences": 1}),
        (4, 4, {"zero_stage": 3, "shard_ranks": 4, "expert_zero_stage": 1}),
        (1, 16, {"zero_stage": 3}),
        (8, 2, {"zero_stage": 3, "node_ranks": 4, "micro_batch_sequences": 1}),
        (16, 1, {"zero_stage": 3, "node_ranks": 4, "recompute": "layer"}),
    ],
)
def test_losses_and_weights_do_not_depend_on_the_layout(
    many: RankPool, job: Any, ep: int, edp: int, settings: dict[str, Any]
) -> None:
    batch = {name: value for name, value in settings.items() if name == "batch_sequences"}
    alone = many.run(1, job, 3, EXACT | batch)
    found = many.run(ep * edp, job, 3, EXACT | {"expert_parallel": ep} | settings)
    np.testing.assert_allclose(found[0].losses, alone[0].losses, rtol=1e-9, atol=0)
    np.testing.assert_allclose(found[0].norms, alone[0].norms, rtol=1e-9, atol=0)
    assert off(whole(found), whole(alone)) <= 1e-9


def test_half_of_the_ranks_continue(many: RankPool, tmp_path: Path) -> None:
    settings = EXACT | {"expert_parallel": 8, "zero_stage": 3}
    before = many.run(16, save_after, str(tmp_path), 3, settings)
    after = many.run(8, resume, str(tmp_path), 3, settings)
    np.testing.assert_allclose(after[0], before[0].losses, rtol=1e-9)
