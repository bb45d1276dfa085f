"""The planner's peak is that of a real step, by the allocator's own records."""

from __future__ import annotations

from typing import Any

import pytest

from moray.pipelines.pretrain.memory import meter
from moray.pipelines.pretrain.memory.measure import step_memory
from tests.pipelines.pretrain.memory.real_steps import gpu_code, job_of, real_step
from tests.ranks import RankPool

pytestmark = pytest.mark.ranks
LONG = pytest.mark.evidence
FP8_EXPERTS = {"expert_zero_stage": 1, "reduce_dtype": "bf16"}
FP8 = {"precision": "fp8", "moments": "fp8"}


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        pytest.param(1, {}, marks=LONG),
        (1, {"precision": "bf16", "recompute": "v3", "batch_sequences": 2}),
        pytest.param(1, FP8 | {"document_mask": True}, marks=LONG),
        pytest.param(1, FP8 | {"recompute": "layer", "zero_stage": 3}, marks=LONG),
        (2, {"precision": "bf16", "expert_parallel": 2, "batch_sequences": 4, "zero_stage": 3}),
        pytest.param(2, {"precision": "fp8", "expert_parallel": 2, "zero_stage": 1}, marks=LONG),
        pytest.param(2, FP8 | {"expert_parallel": 2, "zero_stage": 2, "keep_fp8_transposes": False}, marks=LONG),
        pytest.param(2, {"precision": "bf16", "zero_stage": 2, "micro_batch_sequences": 2}, marks=LONG),
        pytest.param(4, {"precision": "bf16", "expert_parallel": 4, "overlap": False}, marks=LONG),
        pytest.param(4, {"precision": "bf16", "expert_parallel": 4, "node_ranks": 2}, marks=LONG),
        pytest.param(4, FP8 | {"expert_parallel": 4, "node_ranks": 2, "recompute": "layer"}, marks=LONG),
        pytest.param(4, {"expert_parallel": 2, "recompute": "layer", "zero_stage": 3, "shard_ranks": 2}, marks=LONG),
        pytest.param(4, FP8 | {"expert_parallel": 2, "recompute": "v3", "zero_stage": 3, **FP8_EXPERTS}, marks=LONG),
    ],
)
def test_the_plan_is_the_memory_of_a_real_step(
    ranks: RankPool, monkeypatch: pytest.MonkeyPatch, world: int, settings: dict[str, Any]
) -> None:
    settings = settings | {"workers": world}
    real = ranks.run(world, real_step, settings)[0]
    monkeypatch.setattr(meter, "_BLOCK", 1)  # the CPU's allocator does not round
    with gpu_code():
        planned = step_memory(job_of(settings), world, real.imbalance)
    assert planned.device.peak == pytest.approx(real.peak, rel=0.05)
