"""Validation of a pretraining run, at the three times when its inputs become known.

1. `check_recipe`, when a recipe is read: settings that are invalid for any tokens and machines.
2. `check_machines`, when a run is planned and again before it starts: settings that these machines cannot satisfy.
3. `check_continued` and `check_job`, before workers start: settings that do not fit the input model, the tokens or the
   archive.

The single rules follow. Some rules live with the code that they protect and are called from here: too few GPUs in
`devices.resolved`, an uneven batch ramp in `lr_schedule.batch_plan`, the weights of sources in `Mixture`, the shape of
a model in `ModelConfig`. This module does not import torch, so that reading a recipe does not need it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from moray.actors.data.mixture import Mixture
from moray.actors.data.token_set import TokenSet
from moray.models.config import ModelConfig
from moray.models.presets import PRESETS
from moray.models.tensors import checkpoint_shapes
from moray.models.yarn import Yarn, unknown_fields
from moray.pipelines.pretrain.config import Optimizer, PretrainConfig, TrainingSchedule, model_config
from moray.pipelines.pretrain.devices import resolved
from moray.pipelines.pretrain.layout import BLOCK
from moray.pipelines.pretrain.lr_schedule import batch_plan, decay_tokens
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import InputError, RecipeError, nearest

# The largest beta2 at which FP8 second moments are typically within 10 % (`benchmarks/fp8_moments.py`).
MAX_BETA2 = 0.97


def check_recipe(config: PretrainConfig, continues: bool) -> None:
    """Checks the settings by themselves. Raises RecipeError.

    continues: the step has an input model, whose shape is not known yet.
    """
    _check_model_section(config.model, continues)
    try:
        model = None
        if continues:
            check_context(config.model)
        else:
            model = model_config(config.model, vocab_size=1 << 16)  # the real vocabulary is the tokenizer's
            _check_model(config, model)
        check_moments(config.optimizer)
        check_backend(config)
        _check_workers(config, model)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _check_model_section(section: Any, continues: bool) -> None:
    if continues and "preset" in section.model_fields_set:
        raise RecipeError("model.preset conflicts with the input `model`", "remove one of the two")
    rope = section.rope_scaling
    for name in unknown_fields(rope) if isinstance(rope, Mapping) else ():
        fields = [field.name for field in dataclasses.fields(Yarn)]
        raise RecipeError(f"model.rope_scaling: unknown field {name!r}", nearest(name, fields))


def _check_workers(config: PretrainConfig, model: ModelConfig | None) -> None:
    batch_plan(config, sequence_length=1)
    if config.profile and config.profile.steps[0] > config.steps:
        raise ValueError(f"profile.steps begins at step {config.profile.steps[0]}; training has {config.steps}")
    parallel, least = config.parallel, config.resilience.min_workers
    given = "workers" in parallel.model_fields_set
    world = parallel.workers if given else parallel.expert_parallel
    experts = model.n_routed_experts if model else None
    check_layout(world, parallel.expert_parallel, experts)
    check_nodes(parallel.expert_parallel, parallel.node_ranks)
    if given:
        check_shards(world, parallel.shard_ranks)
    if least and least > parallel.workers:
        raise ValueError(f"resilience.min_workers ({least}) must not exceed parallel.workers ({parallel.workers})")


def check_machines(config: PretrainConfig, topology: Topology) -> PretrainConfig:
    """`config` resolved for these machines (see `devices.resolved`). Raises InputError."""
    chosen = resolved(config, topology)
    with rule_errors("set pretrain.parallel.workers and pretrain.parallel.expert_parallel"):
        check_layout(chosen.parallel.workers, chosen.parallel.expert_parallel)
    with rule_errors("set pretrain.parallel.workers and pretrain.parallel.shard_ranks"):
        check_shards(chosen.parallel.workers, chosen.parallel.shard_ranks)
    if chosen.profile and (rank := max(chosen.profile.ranks)) >= (ranks := chosen.parallel.workers):
        hint = f"the ranks are 0 to {ranks - 1}"
        raise InputError(f"pretrain.profile.ranks: there is no rank {rank} of {ranks} workers", hint)
    if chosen.parallel.dispatch == "deepep":
        _check_deepep(chosen, topology.gpus)
    return chosen


def _check_deepep(config: PretrainConfig, gpus: int) -> None:
    """Raises InputError if DeepEP is unavailable. `config` is resolved."""
    instead = "set pretrain.parallel.dispatch to collectives"
    if config.parallel.device == "cpu":
        raise InputError(
            f"pretrain.parallel.dispatch: deepep requires a GPU for each of {config.parallel.workers} workers; the "
            f"cluster has {gpus}",
            instead,
        )
    if importlib.util.find_spec("deep_ep") is None:
        hint = f"install it on the machines of the cluster (https://github.com/deepseek-ai/DeepEP), or {instead}"
        raise InputError(
            "pretrain.parallel.dispatch: deepep requires the package deep_ep, which is not installed", hint
        )


def check_continued(
    config: PretrainConfig, stored: ModelConfig, model: ModelConfig, vocab_size: int, topology: Topology
) -> None:
    """Checks continued training. Raises InputError.

    stored: the config of the input model. model: the same with the recipe's overrides. vocab_size: of the tokens.
    """
    with rule_errors("correct `model` or the layout in the recipe"):
        settings = resolved(config, topology)
        check_layout(settings.parallel.workers, settings.parallel.expert_parallel, model.n_routed_experts)
        _check_model(config, model)
    if checkpoint_shapes(model) != checkpoint_shapes(stored):
        raise InputError(
            "pretrain.model: the overrides change tensor shapes of the input model",
            "override only fields that change no tensor, such as rope_scaling or max_position_embeddings",
        )
    if vocab_size > model.vocab_size:
        raise InputError(
            f"pretrain: the tokens' vocabulary ({vocab_size}) is larger than the input model's ({model.vocab_size})",
            "tokenize with the model's own tokenizer (step model-tokenizer)",
        )


def check_job(config: PretrainConfig, model: ModelConfig, tokens: Mapping[str, TokenSet], topology: Topology) -> None:
    """Checks the settings against the model, the tokens, the archive and the machines. Raises InputError.

    tokens: the token set of each source.
    """
    length = next(iter(tokens.values())).sequence_length
    if length > model.max_position_embeddings:
        raise InputError(
            f"pretrain: sequences of {length} tokens exceed max_position_embeddings ({model.max_position_embeddings})",
            "lower tokenize.sequence_length or raise model.max_position_embeddings",
        )
    with rule_errors("correct `schedule` or `mixture` in the recipe"):
        plan = batch_plan(config, length)
        check_schedule(config.schedule, plan.before(config.steps) * length)
        Mixture({source: token_set.sequences for source, token_set in tokens.items()}, config.mixture, 0, plan)
    if config.checkpoint.archive:
        from moray.pipelines.pretrain.checkpoint.archive import check_archive  # imports boto3

        check_archive(config.checkpoint.archive)
    check_machines(config, topology)


@contextmanager
def rule_errors(hint: str, step: str = "pretrain") -> Iterator[None]:
    """Converts the ValueError of a rule to an InputError with this hint."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{step}: {error}", hint) from error


def check_context(section: Any) -> None:
    """Raises ValueError for context settings that are invalid for any input model.

    The rest of the section can be checked only once the input model exists.
    """
    fields = ("rope_scaling", "rope_theta", "max_position_embeddings")
    given = {name: value for name in fields if (value := getattr(section, name)) is not None}
    dataclasses.replace(PRESETS["tiny"], **given)


def _check_model(config: PretrainConfig, model: ModelConfig) -> None:
    check_dispatch(config.parallel.dispatch, config.precision, model.hidden_size)
    if config.optimizer.moments == "fp8":
        check_blocks(model)


def check_layout(world: int, ep: int, experts: int | None = None) -> None:
    """Raises ValueError for an invalid layout: EP must divide world and experts."""
    if world % ep:
        raise ValueError(f"parallel.workers ({world}) must be a multiple of parallel.expert_parallel ({ep})")
    if experts is not None and experts % ep:
        raise ValueError(f"n_routed_experts ({experts}) must be a multiple of parallel.expert_parallel ({ep})")


def check_nodes(ep: int, node_ranks: int | None) -> None:
    """Raises ValueError unless the ranks that share a set of experts are in one node, or are whole nodes."""
    if node_ranks is not None and ep > node_ranks and ep % node_ranks:
        raise ValueError(f"parallel.expert_parallel ({ep}) must be a multiple of parallel.node_ranks ({node_ranks})")


def check_shards(world: int, shard_ranks: int | None) -> None:
    """Raises ValueError unless whole groups of `shard_ranks` share the weights."""
    if shard_ranks is not None and world % shard_ranks:
        raise ValueError(f"parallel.workers ({world}) must be a multiple of parallel.shard_ranks ({shard_ranks})")


def has_whole_blocks(config: ModelConfig) -> bool:
    """Whether an expert's matrix consists of whole blocks of FP8 moments."""
    return not config.moe_layers or config.moe_intermediate_size * config.hidden_size % BLOCK == 0


def check_blocks(config: ModelConfig) -> None:
    """Raises ValueError if FP8 moments do not fit the model."""
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    if not has_whole_blocks(config):
        raise ValueError(
            f"optimizer.moments: fp8 requires hidden_size x moe_intermediate_size ({hidden} x {inner}) to be a "
            f"multiple of {BLOCK}"
        )


def check_moments(optimizer: Optimizer) -> None:
    """Raises ValueError for a beta2 at which FP8 second moments would not follow the gradients."""
    if optimizer.moments == "fp8" and optimizer.beta2 > MAX_BETA2:
        raise ValueError(
            f"optimizer.moments: fp8 requires beta2 of at most {MAX_BETA2}, not {optimizer.beta2}, since FP8 "
            "rounding loses small changes (at 0.99, after gradients shrink to a quarter, second moments stay 3.3 times "
            "too large, and 1 % of them 11 times); lower beta2 (DeepSeek-V3: 0.95) or set optimizer.moments: float32"
        )


def check_backend(config: PretrainConfig) -> None:
    """Raises ValueError for an invalid combination of optimizer settings."""
    parallel, offload = config.parallel, config.optimizer.offload
    if offload and (parallel.zero_stage not in (1, 2) or parallel.expert_zero_stage is not None):
        raise ValueError(
            "optimizer.offload: true requires parallel.zero_stage 1 or 2 for all weights, because DeepSpeed's ZeRO "
            "offloads"
        )
    if config.precision == "float64" and (offload or config.optimizer.moments == "fp8"):
        raise ValueError(
            "precision: float64 requires optimizer.offload: false and optimizer.moments: float32, because the others' "
            "masters are float32"
        )
    if parallel.offload_activations and parallel.recompute in ("none", "v3"):
        raise ValueError(
            "parallel.offload_activations requires parallel.recompute: layer or {every: n}, whose layers' inputs it "
            "offloads"
        )
    if parallel.expert_zero_stage is not None and not parallel.zero_stage:
        raise ValueError("parallel.expert_zero_stage requires parallel.zero_stage 1, 2 or 3")
    if parallel.shard_ranks is not None and parallel.zero_stage != 3:
        raise ValueError("parallel.shard_ranks requires parallel.zero_stage 3, at which weights are sharded")
    if parallel.reduce_dtype == "bf16" and offload:
        raise ValueError(
            "parallel.reduce_dtype: bf16 requires optimizer.offload: false, because DeepSpeed sums float32"
        )
    if parallel.reduce_dtype == "bf16" and (config.precision not in ("bf16", "fp8") or not parallel.zero_stage):
        raise ValueError(
            "parallel.reduce_dtype: bf16 requires precision bf16 or fp8, and parallel.zero_stage 1, 2 or 3"
        )


def check_dispatch(dispatch: str, precision: str, hidden: int) -> None:
    """Raises ValueError for hidden states that DeepEP does not support."""
    if dispatch != "deepep":
        return
    if precision not in ("bf16", "fp8"):
        raise ValueError(f"parallel.dispatch: deepep requires precision bf16 or fp8, not {precision}")
    if hidden % 16:
        raise ValueError(
            f"parallel.dispatch: deepep requires hidden_size ({hidden}) to be a multiple of 16, because it copies 16 "
            "bytes at a time"
        )


def check_schedule(schedule: TrainingSchedule, total: int) -> None:
    """Raises ValueError if the phases of the schedule have more tokens than the run."""
    parts = {"warmup_tokens": schedule.warmup_tokens, "decay_tokens": decay_tokens(schedule, total)}
    parts["plateaus"] = sum(plateau.tokens for plateau in schedule.plateaus)
    if sum(parts.values()) > total:
        shown = ", ".join(f"{name} {tokens:,}" for name, tokens in parts.items())
        raise ValueError(f"schedule: the phases have more tokens than the run ({total:,}): {shown}")
