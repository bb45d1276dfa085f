"""pretrain: expert-parallel training on Ray Train workers.

Each worker, a Ray actor, hosts the expert shard of its EP rank; Ray Train starts, watches and restarts them. The
step goes on from the newest checkpoint in its folder, whether a worker died (Ray Train starts the group again) or
the whole run did (a rerun finds the folder as it was).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from moray.actors.data.token_set import TokenSet, TokenVocabulary, open_token_sets
from moray.models.config import ModelConfig
from moray.models.presets import parameter_count
from moray.pipelines.pretrain.config import PretrainConfig, TrainingJob, model_config, overridden
from moray.pipelines.pretrain.devices import device_words, resolved
from moray.pipelines.pretrain.lr_schedule import batch_plan
from moray.pipelines.pretrain.trainer import fit
from moray.pipelines.pretrain.validate import check_continued, check_job, check_machines, check_recipe, refused
from moray.platform.core.atomic import write_json
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import InputError, StepFailed
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
        check_recipe(config, continues="model" in inputs)

    def reads_in_place(self, config: PretrainConfig) -> frozenset[str]:
        return frozenset({"tokens"} if config.stream_tokens else ())

    def placement(self, config: PretrainConfig, topology: Topology) -> str:
        return device_words(check_machines(config, topology))

    def run(self, ctx: StepContext[PretrainConfig]) -> None:
        tokens = f"{ctx.inputs['tokens'].address}/train"
        sets = _open(tokens)
        first = next(iter(sets.values()))
        config = _model(ctx, first.vocabulary)
        check_job(ctx.config, config, sets, ctx.cluster.topology())
        topology = ctx.cluster.ensure()
        settings = resolved(ctx.config, topology)
        job = TrainingJob(
            config=settings,
            model=config,
            sequence_length=first.sequence_length,
            folder=str(ctx.folder),
            events=str(ctx.run / "events"),
            step=ctx.step,
            initial=str(ctx.inputs["model"].folder) if "model" in ctx.inputs else None,
            threads=max(1, topology.cpus // settings.workers),
        )
        size = parameter_count(config)
        many = f"{size.total / 1e6:.1f}M parameters, {size.active / 1e6:.1f}M active per token"
        ctx.note(f"{device_words(settings)}; {many}")
        try:
            fit(job, tokens, ctx.run / "train", topology)
        except StepFailed as error:
            raise StepFailed(error.message, f"Ray's logs, once it has stopped: {ctx.cluster.logs}") from error
        write_json(ctx.folder / _TRAINING, {"tokenizer": first.vocabulary.tokenizer})
        self._finish(ctx, config, job, sum(token_set.tokens for token_set in sets.values()))

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


def _model(ctx: StepContext[PretrainConfig], vocabulary: TokenVocabulary) -> ModelConfig:
    """The shape of the model to train, with the tokens' special ids. Raises InputError."""
    continues = "model" in ctx.inputs
    config = _continued(ctx, vocabulary.size) if continues else model_config(ctx.config.model, vocabulary.size)
    return dataclasses.replace(config, bos_token_id=vocabulary.bos, eos_token_id=vocabulary.eos)


def _continued(ctx: StepContext[PretrainConfig], vocab_size: int) -> ModelConfig:
    """The shape of the model to go on from, with the recipe's overrides, none of which may change a tensor."""
    from moray.models.checkpoint import CheckedFolder

    with refused("correct `model` or the layout in the recipe"):
        stored = CheckedFolder(ctx.inputs["model"].folder).config
        config = overridden(stored, ctx.config.model)
    check_continued(ctx.config, stored, config, vocab_size, ctx.cluster.topology())
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
