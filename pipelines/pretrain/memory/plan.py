"""`moray plan --memory` of a pretrain step: the memory of one rank, and the changes that would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moray.models.config import ModelConfig
from moray.pipelines.pretrain.config import EveryLayers, PretrainConfig, TrainingJob
from moray.pipelines.pretrain.devices import resolved
from moray.pipelines.pretrain.memory.gpus import usable_bytes
from moray.pipelines.pretrain.memory.measure import StepMemory, step_memory
from moray.pipelines.pretrain.validate import MAX_BETA2, check_layout, check_shards, has_whole_blocks, rule_errors
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import InputError
from moray.platform.plan.memory import MemoryChange, MemoryRequest, Progress, StepMemoryPlan

_SHOWN = 2  # changes


def plan_memory(job: TrainingJob, request: MemoryRequest, progress: Progress) -> StepMemoryPlan:
    """Raises InputError for an unknown GPU, a layout that is impossible, or settings that cannot be planned."""
    capacity = usable_bytes(request.gpu)
    job = _with(job, _laid_out(job.config, request.world))
    _check(job)
    progress(f"{job.step}: one rank's step")
    found = _measured(job, request)
    changes = () if found.device.peak <= capacity else tuple(_changes(job, request, capacity, progress))
    return StepMemoryPlan(
        step=job.step,
        world=job.config.parallel.workers,
        gpu=request.gpu,
        capacity=capacity,
        device=_sorted(found.device.at_peak),
        largest=_sorted(found.device.largest),
        host=_sorted(found.host.at_peak),
        reads={f"{read.where} {read.what}": count for read, count in found.reads.items()},
        changes=changes,
    )


def check_memory(job: TrainingJob, gpu: str, progress: Progress) -> None:
    """Raises InputError if a step of the job does not fit into this GPU: by how much, and what would make it fit."""
    plan = plan_memory(job, MemoryRequest(gpu), progress)
    if plan.fits:
        return
    part, size = next(iter(plan.device.items()))
    raise InputError(
        f"{job.step}: a step needs {plan.needed / 1e9:.1f} GB on rank 0 of {plan.world}, and {gpu} has "
        f"{plan.capacity / 1e9:.1f} GB for tensors; the largest part is {part}, {size / 1e9:.1f} GB",
        "; or ".join(f"set {change.text} ({change.bytes / 1e9:.1f} GB)" for change in plan.changes)
        or "use more ranks or larger GPUs (moray plan RECIPE --memory)",
    )


def unplanned(config: PretrainConfig) -> tuple[str, str] | None:
    """Why the memory of these settings cannot be planned, and what could be; None if it can."""
    if config.optimizer.offload:
        why = "optimizer.offload cannot be planned, because DeepSpeed allocates it"
        return why, "set optimizer.offload to false and parallel.zero_stage to 3"
    if config.parallel.dispatch == "deepep":
        why = "parallel.dispatch: deepep cannot be planned, because DeepEP allocates its buffers"
        return why, "plan with parallel.dispatch: collectives"
    if config.precision == "float64":
        return "precision: float64 cannot be planned, because it is for checks on CPUs", "plan with float32"
    return None


def _laid_out(config: PretrainConfig, world: int | None) -> PretrainConfig:
    """The config with as many ranks as are given, or else as a cluster of so many GPUs would have."""
    given = config.parallel.model_fields_set
    if "workers" in given:
        return config if world is None else config.with_parallel(workers=world)
    gpus = world or (config.parallel.expert_parallel if "expert_parallel" in given else 1)
    return resolved(config.with_parallel(device="gpu"), Topology(cpus=gpus, gpus=gpus, memory_bytes=0))


def _check(job: TrainingJob) -> None:
    parallel, experts = job.config.parallel, job.model.n_routed_experts
    if parallel.workers % parallel.expert_parallel:
        hint = f"give --world a multiple of expert_parallel ({parallel.expert_parallel})"
    else:
        hint = f"set parallel.expert_parallel to a divisor of the {experts} experts"
    with rule_errors(hint, job.step):
        check_layout(parallel.workers, parallel.expert_parallel, experts)
    with rule_errors(f"give --world a multiple of shard_ranks ({parallel.shard_ranks})", job.step):
        check_shards(parallel.workers, parallel.shard_ranks)
    if found := unplanned(job.config):
        why, instead = found
        raise InputError(f"{job.step}: the memory of {why}", instead)


def _measured(job: TrainingJob, request: MemoryRequest) -> StepMemory:
    return step_memory(job, job.config.parallel.workers, request.imbalance)


def _changes(job: TrainingJob, request: MemoryRequest, capacity: int, progress: Progress) -> Iterator[MemoryChange]:
    """The first changes that fit alone; if none does, the first that do together."""

    def needed(text: str, config: PretrainConfig) -> int:
        progress(f"{job.step} with {text}")
        return _measured(_with(job, config), request).device.peak

    fitting = 0
    for text, config in cheapest_first(job.config, job.model):
        if (size := needed(text, config)) <= capacity:
            fitting += 1
            yield MemoryChange(text, size)
        if fitting == _SHOWN:
            return
    config, texts = job.config, list[str]()
    while not fitting:
        found = next(cheapest_first(config, job.model), None)
        if found is None:
            return
        text, config = found
        texts = [one for one in texts if one.partition(":")[0] != text.partition(":")[0]] + text.split(", ")
        if (size := needed(together := ", ".join(texts), config)) <= capacity:
            yield MemoryChange(together, size)
            return


def cheapest_first(config: PretrainConfig, model: ModelConfig) -> Iterator[tuple[str, PretrainConfig]]:
    """Changes that save memory, (as text, the changed config), those that slow training least first."""
    parallel, experts = config.parallel, model.n_routed_experts
    if config.optimizer.moments == "float32" and config.optimizer.beta2 <= MAX_BETA2 and has_whole_blocks(model):
        moments = config.optimizer.model_copy(update={"moments": "fp8"})
        yield "optimizer.moments: fp8", config.model_copy(update={"optimizer": moments})
    if config.precision == "fp8" and parallel.keep_fp8_transposes:
        yield "parallel.keep_fp8_transposes: false", config.with_parallel(keep_fp8_transposes=False)
    if parallel.zero_stage < 3 and parallel.workers > 1:
        too = "" if parallel.expert_zero_stage is None else ", parallel.expert_zero_stage: null"
        yield f"parallel.zero_stage: 3{too}", config.with_parallel(zero_stage=3, expert_zero_stage=None)
    if parallel.recompute == "none":
        yield "parallel.recompute: v3", config.with_parallel(recompute="v3")
    if parallel.micro_batch_sequences != 1:
        yield "parallel.micro_batch_sequences: 1", config.with_parallel(micro_batch_sequences=1)
    if parallel.recompute in ("none", "v3"):
        yield "parallel.recompute: {every: 2}", config.with_parallel(recompute=EveryLayers(every=2))
    if parallel.recompute != "layer":
        yield "parallel.recompute: layer", config.with_parallel(recompute="layer")
    wider = 2 * parallel.expert_parallel
    if parallel.workers % wider == 0 and experts % wider == 0:
        yield f"parallel.expert_parallel: {wider}", config.with_parallel(expert_parallel=wider)
    if parallel.overlap and parallel.expert_parallel > 1:
        yield "parallel.overlap: false", config.with_parallel(overlap=False)
    if parallel.zero_stage == 3 and parallel.expert_zero_stage in (1, 2):
        yield "parallel.expert_zero_stage: 3", config.with_parallel(expert_zero_stage=3)
    if parallel.shard_ranks is not None:
        yield "parallel.shard_ranks: null", config.with_parallel(shard_ranks=None)
    if parallel.recompute == "layer" and not parallel.offload_activations:
        yield "parallel.offload_activations: true", config.with_parallel(offload_activations=True)


def _with(job: TrainingJob, config: PretrainConfig) -> TrainingJob:
    return dataclasses.replace(job, config=config)


def _sorted(parts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(((part, size) for part, size in parts.items() if size), key=lambda item: -item[1]))
