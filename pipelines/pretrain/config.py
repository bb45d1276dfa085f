"""The settings of a pretraining run, and what of them a training worker is handed."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import Field, create_model

from moray.models.config import ModelConfig
from moray.models.presets import PRESETS
from moray.platform.plan.config import StepConfig, operational

# One optional override per field of ModelConfig, so that a recipe may change any of a preset's sizes by its name.
# The vocabulary is the tokenizer's, not the recipe's.
_OVERRIDES: dict[str, Any] = {
    field.name: (Any, None) for field in dataclasses.fields(ModelConfig) if field.name != "vocab_size"
}
ModelSection: Any = create_model("ModelSection", __base__=StepConfig, preset=(str, "tiny"), **_OVERRIDES)


def model_config(section: Any, vocab_size: int) -> ModelConfig:
    """The preset with the section's overrides. ValueError for an unknown preset or an impossible shape."""
    if section.preset not in PRESETS:
        raise ValueError(f"unknown preset {section.preset!r}; there are {', '.join(sorted(PRESETS))}")
    return overridden(dataclasses.replace(PRESETS[section.preset], vocab_size=vocab_size), section)


def overridden(config: ModelConfig, section: Any) -> ModelConfig:
    """`config` with the section's overrides. ValueError for an impossible shape."""
    given = {name: value for name in _OVERRIDES if (value := getattr(section, name)) is not None}
    return dataclasses.replace(config, **given)


class Plateau(StepConfig):
    """A constant learning rate for so many tokens."""

    tokens: int = Field(gt=0)
    rate: float = Field(ge=0)


class TrainingSchedule(StepConfig):
    """What changes over tokens (arXiv 2412.19437, 4.2). Learning rate: linear warm-up, constant, cosine, plateaus."""

    peak: float = Field(3e-3, gt=0, description="learning rate after warm-up")
    final: float = Field(3e-4, ge=0, description="learning rate at the end of the cosine")
    warmup_tokens: int = Field(0, ge=0)
    decay_tokens: int | None = Field(None, ge=0, description="tokens of the cosine (default: half of the rest)")
    plateaus: tuple[Plateau, ...] = Field((), description="constant rates after the cosine, up to the last token")
    bias_speed: float = Field(1e-3, ge=0, description="router bias update speed")
    bias_frozen_tokens: int = Field(0, ge=0, description="the last so many tokens leave the router biases as they are")
    prediction_weight: float = Field(0.3, ge=0, description="weight of the multi-token prediction loss")
    prediction_weight_final: float = Field(0.1, ge=0, description="the same once the learning rate decays")


class BatchRamp(StepConfig):
    """A batch that grows from `sequences` to `batch_sequences` in equal steps, each for an equal part of the tokens."""

    sequences: int = Field(gt=0, description="sequences in the first global batches")
    tokens: int = Field(gt=0, description="tokens over which the batch grows")
    stages: int = Field(8, gt=0, description="sizes before the last one")


class Spikes(StepConfig):
    """When a batch is skipped, and what is done if trouble returns (`guard.py`)."""

    sigmas: float | None = Field(8.0, gt=0, description="deviations above the last losses; null: only NaN counts")
    window: int = Field(64, ge=16, description="steps whose losses a loss is compared to")
    anticipate_steps: int = Field(100, ge=0, description="steps routed by older weights after trouble has returned")
    anticipate_lag: int = Field(4, gt=0, description="how many steps older these weights are")


class PretrainConfig(StepConfig):
    """`with:` of the pretrain step. The lower block says how to run, and does not enter the fingerprint."""

    model: ModelSection = ModelSection()
    steps: int = Field(gt=0, description="optimizer steps")
    batch_sequences: int = Field(16, gt=0, description="sequences in a global batch")
    batch_ramp: BatchRamp | None = Field(None, description="smaller batches at the beginning")
    mixture: dict[str, float] = Field(default_factory=dict, description="source -> weight; empty: by size")
    schedule: TrainingSchedule = TrainingSchedule()
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    balance_factor: float = Field(1e-4, ge=0, description="factor of the sequence-wise balance loss (alpha)")
    document_mask: bool = Field(True, description="attention stays within a document, positions restart there")
    precision: Literal["float64", "float32", "bf16", "fp8"] = Field(
        "float32",
        description="of rows and products; fp8: linear maps in FP8, the rest as in bf16. Weights stay float32, but for "
        "float64, which is for checks",
    )
    moments: Literal["float32", "fp8"] = Field("float32", description="of AdamW's moments: 8 bytes a parameter, or 2.1")
    spikes: Spikes = Spikes()
    ema_half_life_tokens: int | None = Field(
        None, gt=0, description="keep an exponential moving average of the weights, on the CPU"
    )
    seed: int = Field(1, ge=0)

    device: Literal["auto", "cpu", "gpu"] = operational(
        "auto", description="auto: GPUs, one for each worker, if the cluster has any; then too few of them are an error"
    )
    workers: int = operational(2, gt=0, description="training workers; if not given and there are GPUs: one for each")
    expert_parallel: int = operational(2, gt=0, description="workers that share one set of experts")
    micro_batch_sequences: int | None = operational(None, gt=0)
    overlap: bool = operational(
        True,
        description="micro-batches two at a time, so that one computes while the other's rows are on their way between "
        "ranks; holds what both need for the backward",
    )
    zero_stage: Literal[0, 1, 2] = operational(
        0,
        description="1: masters and moments are partitioned over ranks with the same weights; 2: gradients too",
    )
    offload: bool = operational(False, description="masters, moments and AdamW on the CPU; needs zero_stage 1 or 2")
    dispatch: Literal["collectives", "deepep"] = operational(
        "collectives",
        description="how rows cross between ranks: by torch.distributed, or by DeepEP's kernels, if installed",
    )
    shared_memory: bool = operational(
        True, description="rows for experts of the same host go through memory that ranks share, on CPUs"
    )
    recompute: bool = operational(
        False, description="hold less for the backward, compute norms and up-projections again"
    )
    data_workers: int = operational(1, gt=0)
    prefetch: int = operational(2, gt=0, description="batches that are read in advance")
    stream_tokens: bool = operational(
        False, description="tokens that are only in the shared root are read there, by ranges, and not copied here"
    )
    checkpoint_every: int = operational(50, gt=0)
    keep_checkpoints: int = operational(2, gt=0, description="the newest so many stay")
    keep_checkpoint_hours: float | None = operational(None, gt=0, description="older ones go, but never the newest")
    archive: str | None = operational(
        None,
        pattern="^s3://[^/]",
        description="s3://bucket/prefix that gets every checkpoint, also those not kept here",
    )
    min_workers: int | None = operational(
        None,
        gt=0,
        description="go on with as few, where machines are lost, and with `workers` again once there is room",
    )
    resize_seconds: float = operational(60.0, ge=0, description="how often room for more workers is looked for")
    hang_seconds: float = operational(
        600.0,
        gt=0,
        description="a rank that makes no progress for so long is ended, and training goes on from a checkpoint",
    )
    max_failures: int = operational(3, ge=0)


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """Everything one training worker needs; sent to it whole."""

    config: PretrainConfig
    model: ModelConfig
    sequence_length: int
    folder: str
    events: str
    step: str
    threads: int
    initial: str | None = None  # a Hugging Face folder to go on from
