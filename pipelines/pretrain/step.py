"""pretrain: expert-parallel training on Ray Train workers.

Each worker, a Ray actor, hosts the expert shard of its EP rank; Ray Train starts, watches and restarts them. The
step goes on from the newest checkpoint in its folder, whether a worker died (Ray Train starts the group again) or
the whole run did (a rerun finds the folder as it was).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from moray.actors.data.mixture import Mixture
from moray.actors.data.token_set import TokenSet, open_token_sets
from moray.models.config import ModelConfig
from moray.models.presets import parameter_count
from moray.models.tensors import checkpoint_shapes
from moray.models.yarn import Yarn, unknown_fields
from moray.pipelines.pretrain.config import PretrainConfig, TrainingJob, check_context, model_config, overridden
from moray.pipelines.pretrain.devices import device_words, resolved
from moray.pipelines.pretrain.layout import check_backend, check_blocks, check_dispatch, check_layout, check_moments
from moray.pipelines.pretrain.lr_schedule import batch_plan, check_schedule
from moray.pipelines.pretrain.trainer import fit
from moray.platform.core.atomic import write_json
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import InputError, RecipeError, StepFailed, nearest
from moray.platform.core.events import MetricEvent, read_events
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step

_TRAINING = "training.json"


class Pretrain(Step[PretrainConfig]):
    name: ClassVar[str] = "pretrain"
    version: ClassVar[int] = 4  # 4: padding goes to no expert and counts for no load; balance is a mean over targets
    Config = PretrainConfig
    inputs: ClassVar[dict[str, str]] = {"tokens": "tokens", "model": "model"}
    optional: ClassVar[frozenset[str]] = frozenset({"model"})  # to go on from, instead of random weights
    produces: ClassVar[str] = "checkpoint"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def check(self, config: PretrainConfig, inputs: Mapping[str, str]) -> None:
        if "model" in inputs and "preset" in config.model.model_fields_set:
            raise RecipeError("model.preset is given, and a model to go on from", "leave one of them out")
        rope = getattr(config.model, "rope_scaling")  # noqa: B009 - a field that `create_model` made
        for name in unknown_fields(rope) if isinstance(rope, Mapping) else ():
            fields = [field.name for field in dataclasses.fields(Yarn)]
            raise RecipeError(f"model.rope_scaling: unknown field {name!r}", nearest(name, fields))
        try:
            experts = None
            if "model" in inputs:
                check_context(config.model)
            else:
                # The real vocabulary is the tokenizer's.
                model = model_config(config.model, vocab_size=1 << 16)
                experts = model.n_routed_experts
                check_dispatch(config.dispatch, config.precision, model.hidden_size)
                if config.moments == "fp8":
                    check_blocks(model)
            check_moments(config.moments, config.beta2)
            check_backend(config.zero_stage, config.offload, config.precision, config.moments)
            sizes = batch_plan(config, sequence_length=1).sizes
            # Without a number of workers, the machines decide it: see `placement`.
            given = "workers" in config.model_fields_set
            world = config.workers if given else config.expert_parallel
            check_layout(world, config.expert_parallel, experts, sizes if given else ())
            if config.min_workers and config.min_workers > config.workers:
                raise ValueError(f"min_workers ({config.min_workers}) must not exceed workers ({config.workers})")
        except ValueError as error:
            raise RecipeError(str(error)) from error

    def reads_in_place(self, config: PretrainConfig) -> frozenset[str]:
        return frozenset({"tokens"} if config.stream_tokens else ())

    def placement(self, config: PretrainConfig, topology: Topology) -> str:
        chosen = resolved(config, topology)
        try:
            check_layout(chosen.workers, chosen.expert_parallel, None, batch_plan(chosen, sequence_length=1).sizes)
        except ValueError as error:
            raise InputError(f"pretrain: {error}", "set pretrain.workers and pretrain.expert_parallel") from error
        if chosen.dispatch == "deepep":
            _check_deepep(chosen, topology.gpus)
        return device_words(chosen)

    def run(self, ctx: StepContext[PretrainConfig]) -> None:
        tokens = f"{ctx.inputs['tokens'].address}/train"
        sets = _open(tokens)
        first = next(iter(sets.values()))
        config = self._model(ctx, first.vocabulary.size, first.vocabulary.bos, first.vocabulary.eos)
        if first.sequence_length > config.max_position_embeddings:
            raise InputError(
                f"sequences of {first.sequence_length} tokens exceed max_position_embeddings "
                f"{config.max_position_embeddings}",
                "shorten tokenize.sequence_length or raise model.max_position_embeddings",
            )
        try:
            plan = batch_plan(ctx.config, first.sequence_length)
            check_schedule(ctx.config.schedule, plan.before(ctx.config.steps) * first.sequence_length)
            Mixture({name: token_set.sequences for name, token_set in sets.items()}, ctx.config.mixture, 0, plan)
        except ValueError as error:
            raise InputError(f"pretrain: {error}", "correct `schedule` or `mixture` in the recipe") from error
        if ctx.config.archive:
            from moray.pipelines.pretrain.checkpoint.archive import check_archive  # it imports boto3

            check_archive(ctx.config.archive)
        self.placement(ctx.config, ctx.cluster.topology())
        topology = ctx.cluster.ensure()
        settings = resolved(ctx.config, topology)
        job = TrainingJob(
            config=settings, model=config, sequence_length=first.sequence_length, folder=str(ctx.folder),
            events=str(ctx.run / "events"), step=ctx.step,
            initial=str(ctx.inputs["model"].folder) if "model" in ctx.inputs else None,
            threads=max(1, topology.cpus // settings.workers),
        )  # fmt: skip
        size = parameter_count(config)
        many = f"{size.total / 1e6:.1f}M parameters, {size.active / 1e6:.1f}M active per token"
        ctx.note(f"{device_words(settings)}; {many}")
        try:
            fit(job, tokens, ctx.run / "train", topology)
        except StepFailed as error:
            raise StepFailed(error.message, f"Ray's logs, once it has stopped: {ctx.cluster.logs}") from error
        write_json(ctx.folder / _TRAINING, {"tokenizer": first.vocabulary.tokenizer})
        self._finish(ctx, config, job, sum(token_set.tokens for token_set in sets.values()))

    def _model(self, ctx: StepContext[PretrainConfig], vocab_size: int, bos: int, eos: int) -> ModelConfig:
        config = _continued(ctx, vocab_size) if "model" in ctx.inputs else model_config(ctx.config.model, vocab_size)
        return dataclasses.replace(config, bos_token_id=bos, eos_token_id=eos)

    def _finish(self, ctx: StepContext[PretrainConfig], config: ModelConfig, job: TrainingJob, available: int) -> None:
        """Leaves one checkpoint, the model's shape and the loss curve; says what was reached."""
        final = ctx.folder / "checkpoints" / f"step-{job.config.steps:08d}"
        for other in (ctx.folder / "checkpoints").iterdir():
            if other != final:
                shutil.rmtree(other)
        write_json(ctx.folder / "model.json", dataclasses.asdict(config))
        curve = loss_curve(ctx.run, ctx.step)
        write_json(ctx.folder / "curve.json", curve)
        trained = batch_plan(job.config, job.sequence_length).before(job.config.steps) * job.sequence_length
        tail = [value for _, value in curve[-10:]]
        ctx.counts |= {"in:tokens": trained, "out:steps": job.config.steps, "available_tokens": available}
        if tail:
            ctx.counts["final_loss"] = sum(tail) / len(tail)
            ctx.outcome = f"loss {curve[0][1]:.3f} -> {ctx.counts['final_loss']:.3f} nats/token, "
        ctx.outcome += f"{trained / available:.2f} epochs"


def _open(tokens: str) -> dict[str, TokenSet]:
    try:
        return open_token_sets(tokens)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"pretrain: {error}", "tokenize again: step tokenize") from error


def _check_deepep(config: PretrainConfig, gpus: int) -> None:
    """Raises InputError where DeepEP cannot be, for a resolved config."""
    instead = "leave out `dispatch`, or set it to collectives"
    if config.device == "cpu":
        raise InputError(
            f"pretrain: dispatch: deepep wants a GPU for each of {config.workers} workers, there are {gpus}", instead
        )
    if importlib.util.find_spec("deep_ep") is None:
        hint = f"install it where Ray's workers run (https://github.com/deepseek-ai/DeepEP), or {instead}"
        raise InputError("pretrain: dispatch: deepep, but the package deep_ep is not installed", hint)


def _continued(ctx: StepContext[PretrainConfig], vocab_size: int) -> ModelConfig:
    """The shape of the model to go on from, with the recipe's overrides, none of which may change a tensor."""
    from moray.models.checkpoint import CheckedFolder

    try:
        stored = CheckedFolder(ctx.inputs["model"].folder).config
        config = overridden(stored, ctx.config.model)
        settings = resolved(ctx.config, ctx.cluster.topology())
        check_layout(settings.workers, settings.expert_parallel, config.n_routed_experts)
        check_dispatch(ctx.config.dispatch, ctx.config.precision, config.hidden_size)
        if ctx.config.moments == "fp8":
            check_blocks(config)
    except ValueError as error:
        raise InputError(f"pretrain: {error}", "correct `model` or the layout in the recipe") from error
    if checkpoint_shapes(config) != checkpoint_shapes(stored):
        raise InputError(
            "pretrain: `model` changes the shape of the model to go on from",
            "override only what changes no tensor, such as rope_scaling or max_position_embeddings",
        )
    if vocab_size > config.vocab_size:
        raise InputError(
            f"the tokens have a vocabulary of {vocab_size}, the model to go on from of {config.vocab_size}",
            "tokenize with its own tokenizer: step model-tokenizer",
        )
    return config


def loss_curve(run: Path, step: str) -> list[tuple[int, float]]:
    """(step, loss) of this run, ascending; a step that was done twice (after a failure) counts once, the last time."""
    found = {
        event.at: event.value
        for event in read_events(run)
        if isinstance(event, MetricEvent) and event.name == "train_loss" and event.step == step
    }
    return sorted(found.items())


def checkpoint_folder(artifact: Path) -> Path:
    """The final checkpoint of a pretrain artifact."""
    return next((artifact / "checkpoints").glob("step-*"))


def read_model_config(artifact: Path) -> ModelConfig:
    return ModelConfig(**json.loads((artifact / "model.json").read_text()))


def read_tokenizer_fingerprint(artifact: Path) -> str:
    """The tokenizer that a pretrain artifact's tokens were made with."""
    return str(json.loads((artifact / _TRAINING).read_text())["tokenizer"])


step = Pretrain()
