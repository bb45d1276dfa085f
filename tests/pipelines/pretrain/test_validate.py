"""The single validation rules. test_step.py tests their errors before a run."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from moray.pipelines.pretrain.config import TrainingSchedule
from moray.pipelines.pretrain.validate import (
    check_backend,
    check_layout,
    check_machines,
    check_nodes,
    check_recipe,
    check_schedule,
)
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import InputError, RecipeError
from tests.pipelines.pretrain.settings import pretrain_config


@pytest.mark.parametrize(
    ("layout", "message"),
    [((3, 2), "workers"), ((6, 3, 8), "n_routed_experts")],
)
def test_an_invalid_layout_is_refused(layout: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(*layout)


def test_ranks_that_share_experts_are_in_one_node_or_are_whole_nodes() -> None:
    for ep, node_ranks in ((8, None), (8, 8), (4, 8), (16, 8), (12, 1)):
        check_nodes(ep, node_ranks)
    with pytest.raises(ValueError, match=r"expert_parallel \(12\) must be a multiple of parallel.node_ranks \(8\)"):
        check_nodes(12, 8)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"offload": True}, "optimizer.offload: true requires parallel.zero_stage 1 or 2"),
        ({"offload": True, "zero_stage": 3}, "optimizer.offload: true requires parallel.zero_stage 1 or 2"),
        ({"offload_activations": True, "recompute": "v3"}, "parallel.offload_activations requires"),
        ({"expert_zero_stage": 1}, "parallel.expert_zero_stage requires parallel.zero_stage"),
        (
            {"zero_stage": 1, "offload": True, "reduce_dtype": "bf16", "precision": "bf16"},
            "reduce_dtype: bf16 requires optimizer.offload: false",
        ),
        ({"zero_stage": 2, "shard_ranks": 2}, "parallel.shard_ranks requires parallel.zero_stage 3"),
        ({"zero_stage": 3, "reduce_dtype": "bf16"}, "parallel.reduce_dtype: bf16 requires precision bf16 or fp8"),
        ({"zero_stage": 1, "offload": True, "precision": "float64"}, "float64 requires optimizer.offload: false"),
        ({"precision": "float64", "moments": "fp8"}, "optimizer.offload: false and optimizer.moments: float32"),
    ],
)
def test_invalid_optimizer_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_backend(pretrain_config(steps=1, **settings))
    check_backend(pretrain_config(steps=1, zero_stage=1, offload=True, precision="bf16", moments="fp8"))


def test_a_schedule_with_more_tokens_than_the_run_is_refused() -> None:
    plateaus = ({"tokens": 100, "rate": 0.1}, {"tokens": 50, "rate": 0.03})
    fields = {"warmup_tokens": 100, "decay_tokens": 400, "plateaus": plateaus}
    schedule = TrainingSchedule.model_validate(fields)
    check_schedule(schedule, 1000)
    with pytest.raises(ValueError, match=r"more tokens than the run \(600\): warmup_tokens 100, decay_tokens 400"):
        check_schedule(schedule, 600)


def test_a_profile_is_of_steps_and_ranks_that_exist() -> None:
    with pytest.raises(ValidationError, match=r"\[5, 2\] must be a first step, from 1, and a last one"):
        pretrain_config(steps=10, profile={"steps": [5, 2]})
    with pytest.raises(RecipeError, match=r"profile.steps begins at step 11; training has 10"):
        check_recipe(pretrain_config(steps=10, profile={"steps": [11, 12]}), continues=False)
    config = pretrain_config(steps=10, workers=2, profile={"steps": [5, 6], "ranks": [0, 2]})
    with pytest.raises(InputError, match=r"pretrain.profile.ranks: there is no rank 2 of 2 workers"):
        check_machines(config, Topology(cpus=2, gpus=0, memory_bytes=1 << 30))
