"""Plans of memory: what they contain, where the host waits, and how a job that does not fit is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from moray.models.presets import preset
from moray.pipelines.pretrain.config import Parallel, TrainingJob
from moray.pipelines.pretrain.memory.gpus import gpu_of
from moray.pipelines.pretrain.memory.measure import step_memory
from moray.pipelines.pretrain.memory.plan import cheapest_first, check_memory, plan_memory
from moray.pipelines.pretrain.memory.planned_job import planned_job
from moray.platform.api import open_recipe
from moray.platform.core.errors import InputError
from moray.platform.plan.memory import MemoryRequest
from tests.pipelines.pretrain.settings import pretrain_config

ROOT = Path(__file__).parents[4]
WIDE_END = dataclasses.replace(preset("v3"), num_hidden_layers=9)
V3 = dataclasses.replace(preset("v3"), num_hidden_layers=5)


def job_of(model: Any = V3, length: int = 4096, **settings: Any) -> TrainingJob:
    fields = {"steps": 10, "batch_sequences": 2048, "precision": "fp8", "moments": "fp8", "micro_batch_sequences": 1}
    fields |= {"workers": 512, "expert_parallel": 64, "zero_stage": 3, "recompute": "v3", "document_mask": False}
    return TrainingJob(pretrain_config(**fields | settings), model, length, "/nonexistent/run", "", "pretrain", 1)


def test_the_host_waits_for_the_device_at_these_places_only() -> None:
    """Another one would keep a GPU's host from running ahead. The rows of an exchange are read once in each layer and
    micro-batch, and once more where the backward repeats the layer."""
    layers, batches = 2 + 1, 4  # with MTP
    found = step_memory(job_of(), 512).reads
    assert {(read.where, read.what): count for read, count in found.items()} == {
        ("models/expert_parallel/count_exchange.py:wait", "copies a tensor to the host"): layers * batches,
        ("pipelines/pretrain/train_step.py:measure", "copies a tensor to the host"): 1,  # the sums of the losses
        ("pipelines/pretrain/train_step.py:measure", "reads a number"): 1,  # the norm of the gradient
        ("pipelines/pretrain/train_step.py:take", "reads a number"): 1,  # the worst overload
    }
    again = step_memory(job_of(recompute="layer"), 512).reads
    assert sum(again.values()) == sum(found.values()) + layers * batches


def test_sharding_and_recompute_save_what_they_should() -> None:
    whole, sharded = (step_memory(job_of(WIDE_END, zero_stage=stage), 512).device for stage in (1, 3))
    assert whole.largest["gradients"] > 1.5 * sharded.largest["gradients"]
    kept, v3, layer = (
        step_memory(job_of(recompute=policy), 512).device.largest["activations"] for policy in ("none", "v3", "layer")
    )
    assert kept > v3 > layer
    forms = [
        step_memory(job_of(expert_zero_stage=1, keep_fp8_transposes=keep), 512).device.largest["quantized weights"]
        for keep in (True, False)
    ]
    experts = 2 * (256 // 64) * 3 * 2048 * 7168  # of two layers, one byte each
    assert forms[0] - forms[1] > 0.5 * experts
    offloaded = step_memory(job_of(recompute="layer", offload_activations=True), 512)
    assert offloaded.device.largest["activations"] < layer
    inputs = offloaded.host.largest["offloaded activations"]
    assert inputs == 2 * 6 * 2**26  # two micro-batches, six layers; 4096 x 7168 in BF16 take 64 MiB when pinned


def test_an_imbalance_needs_more_memory() -> None:
    even, uneven = (step_memory(job_of(), 512, imbalance).device for imbalance in (1.0, 2.0))
    assert uneven.largest["activations"] > 1.2 * even.largest["activations"]


def test_a_job_that_does_not_fit_is_refused_with_two_changes_that_would_fit() -> None:
    job = job_of(zero_stage=1, recompute="none")
    with pytest.raises(InputError) as caught:
        check_memory(job, "a100-40gb", lambda text: None)
    assert re.search(
        r"pretrain: a step needs \d+\.\d GB on rank 0 of 512, and a100-40gb has 39\.5 GB", str(caught.value)
    )
    assert "the largest part is" in caught.value.message
    assert len(re.findall(r"set \S.*? \(\d+\.\d GB\)", caught.value.hint)) >= 1
    check_memory(job_of(recompute="layer"), "h100-80gb", lambda text: None)


def test_what_fits_nowhere_says_so() -> None:
    long = dataclasses.replace(preset("tiny"), max_position_embeddings=1 << 25)
    plan = plan_memory(
        job_of(long, 1 << 25, workers=1, expert_parallel=1), MemoryRequest("rtx4090-24gb"), lambda text: None
    )
    assert not plan.fits
    assert not plan.changes


@pytest.mark.parametrize(
    ("request_", "settings", "message"),
    [
        (MemoryRequest("h100"), {}, "unknown GPU 'h100'"),
        (MemoryRequest("h100-80gb", world=500), {}, "must be a multiple of parallel.expert_parallel"),
        (MemoryRequest("h100-80gb", world=64), {"shard_ranks": 128}, "must be a multiple of parallel.shard_ranks"),
        (MemoryRequest("h100-80gb"), {"zero_stage": 1, "offload": True}, "optimizer.offload cannot be planned"),
        (MemoryRequest("h100-80gb"), {"dispatch": "deepep"}, "deepep cannot be planned"),
        (MemoryRequest("h100-80gb"), {"precision": "float64", "moments": "float32"}, "float64 cannot be planned"),
    ],
)
def test_bad_requests(request_: MemoryRequest, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_memory(job_of(**settings), request_, lambda text: None)


def test_ranks_that_the_recipe_does_not_name_are_those_of_a_cluster_of_such_gpus() -> None:
    job = dataclasses.replace(job_of(), model=preset("tiny"), sequence_length=16)

    def world(request: MemoryRequest, **parallel: Any) -> int:
        section = Parallel.model_validate(parallel)
        config = job.config.model_copy(update={"parallel": section, "precision": "bf16"})
        return plan_memory(dataclasses.replace(job, config=config), request, lambda text: None).world

    assert world(MemoryRequest("h100-80gb")) == 1
    assert world(MemoryRequest("h100-80gb", world=4)) == 4
    assert world(MemoryRequest("h100-80gb"), expert_parallel=4) == 4
    assert world(MemoryRequest("h100-80gb"), workers=2) == 2
    assert world(MemoryRequest("h100-80gb", world=1), workers=2, expert_parallel=1) == 1


def test_a_change_that_the_model_does_not_allow_is_not_offered() -> None:
    odd = dataclasses.replace(preset("tiny"), hidden_size=66, moe_intermediate_size=31)
    config = job_of(moments="float32", zero_stage=2, expert_zero_stage=1).config
    texts = [text for text, _ in cheapest_first(config, odd)]
    assert "optimizer.moments: fp8" not in texts
    assert "optimizer.moments: fp8" in [text for text, _ in cheapest_first(config, preset("tiny"))]
    assert "parallel.zero_stage: 3, parallel.expert_zero_stage: null" in texts


def test_a_recipe_tells_the_shape_of_each_of_its_models() -> None:
    recipe = open_recipe("v3-671b")
    jobs = {step.key: planned_job(recipe, step) for step in recipe.steps if step.step.name == "pretrain"}
    assert {key: job.sequence_length for key, job in jobs.items()} == {
        "pretrain": 4096,
        "extend-32k": 32768,
        "extend-128k": 131072,
    }
    assert {job.model.n_routed_experts for job in jobs.values()} == {256}
    assert jobs["extend-128k"].model.max_position_embeddings == 163840


def test_rays_accelerator_types_are_known() -> None:
    assert gpu_of({"CPU": 8.0, "accelerator_type:H100": 1.0, "accelerator_type:H200": 1.0}) == "h100-80gb"
    assert gpu_of({"CPU": 8.0}) is None


def test_no_code_knows_that_it_is_planned() -> None:
    """Models are built on the meta device in training too; nothing else mentions it."""
    allowed = {"models/checkpoint.py", "pipelines/pretrain/worker.py"}
    sources = [
        path for folder in ("kernels", "models", "pipelines", "actors") for path in (ROOT / folder).rglob("*.py")
    ]
    mention = re.compile(r"""is_meta|device\(["']meta|type\b.*["']meta["']""")
    found = {path.relative_to(ROOT).as_posix() for path in sources if mention.search(path.read_text())}
    planner = {name for name in found if name.startswith("pipelines/pretrain/memory/")}
    assert planner
    assert found - planner == allowed
    assert not any("is_meta" in (ROOT / name).read_text() for name in allowed)
