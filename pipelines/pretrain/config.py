"""Settings of a pretraining run, and the job that each training worker receives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, create_model, field_validator
from pydantic_core import PydanticCustomError

from moray.actors.data.held_out import HeldOutPlan
from moray.models.config import ModelConfig
from moray.models.presets import PRESETS
from moray.platform.plan.config import StepConfig, operational, section

# One optional override per field of ModelConfig, so that a recipe may change any of a preset's sizes by its name.
# The vocabulary is the tokenizer's, not the recipe's.
_OVERRIDES: dict[str, Any] = {
    field.name: (Any, None) for field in dataclasses.fields(ModelConfig) if field.name != "vocab_size"
}
ModelSection: Any = create_model("ModelSection", __base__=StepConfig, preset=(str, "tiny"), **_OVERRIDES)


def model_config(section: Any, vocab_size: int) -> ModelConfig:
    """The preset with the section's overrides. Raises ValueError for an unknown preset or an invalid shape."""
    if section.preset not in PRESETS:
        raise ValueError(f"unknown preset {section.preset!r}; the presets are {', '.join(sorted(PRESETS))}")
    return overridden(dataclasses.replace(PRESETS[section.preset], vocab_size=vocab_size), section)


def overridden(config: ModelConfig, section: Any) -> ModelConfig:
    """`config` with the section's overrides. Raises ValueError for an invalid shape."""
    given = {name: value for name in _OVERRIDES if (value := getattr(section, name)) is not None}
    return dataclasses.replace(config, **given)


class Plateau(StepConfig):
    """A constant learning rate for a number of tokens."""

    tokens: int = Field(gt=0)
    rate: float = Field(ge=0)


class TrainingSchedule(StepConfig):
    """Values that change over tokens (arXiv 2412.19437, 4.2). Learning rate: linear warm-up, constant, cosine decay,
    plateaus."""

    peak: float = Field(3e-3, gt=0, description="learning rate after warm-up")
    final: float = Field(3e-4, ge=0, description="learning rate at the end of the cosine decay")
    warmup_tokens: int = Field(0, ge=0)
    decay_tokens: int | None = Field(
        None, ge=0, description="tokens of the cosine decay (default: half of the tokens before the plateaus)"
    )
    plateaus: tuple[Plateau, ...] = Field((), description="constant learning rates between the cosine and the end")
    bias_speed: float = Field(1e-3, ge=0, description="router bias update speed")
    bias_frozen_tokens: int = Field(
        0, ge=0, description="tokens at the end of training during which router biases are not updated"
    )
    prediction_weight: float = Field(0.3, ge=0, description="weight of the multi-token prediction (MTP) loss")
    prediction_weight_final: float = Field(
        0.1, ge=0, description="weight of the MTP loss from the start of the cosine decay"
    )


class BatchRamp(StepConfig):
    """A batch that grows from `sequences` to `batch_sequences` in equal stages, each for an equal share of `tokens`."""

    sequences: int = Field(gt=0, description="sequences in the first global batches")
    tokens: int = Field(gt=0, description="tokens over which the batch grows")
    stages: int = Field(8, gt=0, description="number of batch sizes before the final one")


class Spikes(StepConfig):
    """Loss spikes: when a batch is skipped, and how training recovers if spikes return (`resilience/guard.py`)."""

    sigmas: float | None = Field(
        8.0, gt=0, description="deviations above recent losses that make a spike; null: only NaN and infinity count"
    )
    window: int = Field(64, ge=16, description="steps of recent losses that a loss is compared with")
    anticipate_steps: int = Field(
        100, ge=0, description="steps with anticipatory routing (by older weights) after spikes return"
    )
    anticipate_lag: int = Field(4, gt=0, description="age in steps of the weights that anticipatory routing uses")


class Optimizer(StepConfig):
    """AdamW."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0, description="maximum global gradient norm")
    moments: Literal["float32", "fp8"] = Field(
        "float32", description="dtype of AdamW's moments: 8 bytes per parameter in float32, 2.1 in FP8"
    )
    offload: bool = operational(
        False,
        description="keep master weights and moments, and run AdamW, on the CPU; requires parallel.zero_stage 1 or 2",
    )


class EveryLayers(StepConfig):
    """Every n-th layer."""

    every: int = Field(gt=0)


class Parallel(StepConfig):
    """The ranks, what each of them holds, and how it computes its share."""

    device: Literal["auto", "cpu", "gpu"] = operational(
        "auto",
        description="auto: one GPU per worker if the cluster has any GPU, and an error if it has too few; else CPUs",
    )
    workers: int = operational(
        2, gt=0, description="number of training workers (ranks); if not given and there are GPUs: one per GPU"
    )
    expert_parallel: int = operational(2, gt=0, description="expert parallelism: workers that share one set of experts")
    micro_batch_sequences: int | None = operational(
        None, gt=0, description="sequences per micro-batch on each rank (default: the rank's whole batch)"
    )
    overlap: bool = operational(
        True,
        description="run micro-batches in pairs: one computes while the other's tokens are exchanged between ranks; "
        "keeps the activations of both for the backward",
    )
    zero_stage: Literal[0, 1, 2, 3] = operational(
        0,
        description="0: no partitioning; 1: partition master weights and moments over the ranks that hold the same "
        "weights; 2: gradients too; 3: weights too",
    )
    expert_zero_stage: Literal[1, 2, 3] | None = operational(
        None, description="zero_stage of experts, whose ranks are those with the same experts (default: zero_stage)"
    )
    shard_ranks: int | None = operational(
        None,
        gt=1,
        description="zero_stage 3: consecutive ranks over which dense weights are sharded, such as those of a node "
        "(default: all)",
    )
    reduce_dtype: Literal["float32", "bf16"] = operational(
        "float32",
        description="dtype in which zero_stage 1 to 3 sum the gradients of matrices over ranks; bf16 in bf16 and fp8 "
        "training only. Micro-batches are summed in float32",
    )
    dispatch: Literal["collectives", "deepep"] = operational(
        "collectives",
        description="transport of expert-parallel dispatch and combine: torch.distributed, or DeepEP's kernels "
        "(deepep: experimental, not yet run on any machine)",
    )
    node_ranks: int | None = operational(
        None,
        gt=0,
        description="consecutive ranks of a node: tokens are sent once to each node, and forwarded within it (default: "
        "the ranks of a host, if all hosts have as many; 1: tokens are sent once to each rank)",
    )
    shared_memory: bool = operational(
        True, description="on CPUs, dispatch tokens between ranks of one host through shared memory"
    )
    recompute: Literal["none", "v3", "layer"] | EveryLayers = operational(
        "none",
        description="tensors that the backward recomputes, to save memory. v3: norms and up-projections of attention; "
        "layer: whole layers; {every: n}: every n-th layer whole, v3 in the others",
    )
    offload_activations: bool = operational(
        False,
        description="keep the inputs of recomputed layers in the host's memory; requires recompute: layer or every",
    )
    collect_every: int = operational(
        50,
        gt=0,
        description="steps between garbage collections of Python, which all ranks run at the same steps; none waits "
        "for another's",
    )
    keep_fp8_transposes: bool = operational(
        True,
        description="fp8 training on GPUs: keep the transposed quantized weights from the first backward until the "
        "weights change; false: each backward makes them",
    )

    @field_validator("recompute", mode="before")
    @classmethod
    def _was_a_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise PydanticCustomError(
                "recompute", "{message}", {"message": "must be a policy", "hint": f"write {'v3' if value else 'none'}"}
            )
        return value


class Checkpoint(StepConfig):
    """Checkpoints on disk and in the archive."""

    every: int = operational(50, gt=0, description="steps between checkpoints")
    keep: int = operational(2, gt=0, description="number of newest checkpoints to keep on disk")
    keep_hours: float | None = operational(
        None, gt=0, description="also remove checkpoints older than this; the newest is always kept"
    )
    archive: str | None = operational(
        None,
        pattern="^s3://[^/]",
        description="s3://bucket/prefix to which every checkpoint is copied",
    )


class Stragglers(StepConfig):
    """Ranks that stay slower than the others: when a warning names them (`stragglers.py`)."""

    every: int = Field(10, gt=0, description="steps between comparisons of the ranks' busy times")
    excess: float = Field(
        0.2, gt=0, description="busy time above the median rank's, as a share of it, from which a rank is slow"
    )
    reports: int = Field(6, gt=0, description="comparisons in a row in which a rank is slow before the warning")


class Resilience(StepConfig):
    """Reactions to bad batches, slow ranks, hangs and lost machines."""

    spikes: Spikes = Spikes()
    stragglers: Stragglers = operational(Stragglers(), description="ranks that stay slower than the others")
    min_workers: int | None = operational(
        None,
        gt=0,
        description="after machines are lost, continue with at least this many workers, and return to "
        "`parallel.workers` when the cluster has capacity again",
    )
    resize_seconds: float = operational(60.0, ge=0, description="seconds between checks for capacity for more workers")
    hang_seconds: float = operational(
        600.0,
        gt=0,
        description="kill a rank that makes no progress for this long; training then resumes from a checkpoint",
    )
    max_failures: int = operational(3, ge=0, description="restarts after failures before the run fails")


class ProfiledSteps(StepConfig):
    """A recording of some steps by torch's profiler, into the folder `profile` of the step."""

    steps: tuple[int, int] = Field(description="first and last recorded step, counted from 1")
    ranks: tuple[int, ...] = Field((0,), min_length=1, description="ranks that record")

    @field_validator("steps")
    @classmethod
    def _ascend(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1]:
            raise ValueError(f"{list(value)} must be a first step, from 1, and a last one that is not smaller")
        return value


class PretrainConfig(StepConfig):
    """`with:` of the pretrain step."""

    moved: ClassVar[Mapping[str, str]] = {
        **{name: f"optimizer.{name}" for name in Optimizer.model_fields},
        **{name: f"parallel.{name}" for name in Parallel.model_fields},
        **{name: f"resilience.{name}" for name in Resilience.model_fields},
        "checkpoint_every": "checkpoint.every",
        "keep_checkpoints": "checkpoint.keep",
        "keep_checkpoint_hours": "checkpoint.keep_hours",
        "archive": "checkpoint.archive",
    }

    model: ModelSection = ModelSection()
    steps: int = Field(gt=0, description="optimizer steps")
    batch_sequences: int = Field(16, gt=0, description="sequences in a global batch")
    batch_ramp: BatchRamp | None = Field(None, description="smaller batches at the start of training")
    mixture: dict[str, float] = Field(
        default_factory=dict, description="sampling weight of each source; empty: proportional to its size"
    )
    schedule: TrainingSchedule = TrainingSchedule()
    balance_factor: float = Field(1e-4, ge=0, description="factor of the sequence-wise balance loss (alpha)")
    document_mask: bool = Field(
        True, description="attention does not cross document boundaries, and positions restart with each document"
    )
    precision: Literal["float64", "float32", "bf16", "fp8"] = Field(
        "float32",
        description="dtype of activations and matrix products; fp8: linear layers in FP8, everything else in BF16. "
        "Master weights are float32, except with float64, which is for numerical checks",
    )
    ema_half_life_tokens: int | None = Field(
        None, gt=0, description="half-life of an exponential moving average (EMA) of the weights, kept on the CPU"
    )
    seed: int = Field(1, ge=0)

    optimizer: Optimizer = section(Optimizer)
    parallel: Parallel = section(Parallel)
    checkpoint: Checkpoint = section(Checkpoint)
    resilience: Resilience = section(Resilience)
    evaluate_every: int | None = operational(
        None, gt=0, description="steps between measurements of the loss on held-out tokens (default: never)"
    )
    evaluate_sequences: int = operational(
        64, gt=0, description="held-out sequences of each source, the same in each measurement"
    )
    profile: ProfiledSteps | None = operational(
        None, description="record a trace of some steps on some ranks, and on GPUs the memory's history"
    )
    data_workers: int = operational(1, gt=0, description="Ray actors that read and assemble batches")
    prefetch: int = operational(2, gt=0, description="batches that are requested in advance")
    stream_tokens: bool = operational(
        False, description="read tokens from the shared root by ranged requests, without copying them to this machine"
    )

    def with_parallel(self, **changes: Any) -> PretrainConfig:
        """A copy with other values of the section `parallel`."""
        return self.model_copy(update={"parallel": self.parallel.model_copy(update=changes)})


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """Everything that one training worker needs. Ray Train sends it to each worker."""

    config: PretrainConfig
    model: ModelConfig
    sequence_length: int
    folder: str
    events: str
    step: str
    threads: int
    initial: str | None = None  # a Hugging Face folder with the initial weights
    sources: tuple[str, ...] = ()  # sorted names of the sources of the training tokens, of which losses are reported
    held_out: HeldOutPlan | None = None  # for `evaluate_every`
