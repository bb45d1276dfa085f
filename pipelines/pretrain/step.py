"""pretrain: expert-parallel training on Ray Train workers.

Each worker is a Ray actor that holds the expert shard of its EP rank. Ray Train starts the workers, watches them and
restarts them. Training resumes from the newest checkpoint in the step's folder, both after a worker died (Ray Train
restarts the worker group) and after the whole run died (a rerun finds the same folder).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from moray.actors.data.held_out import HeldOutPlan
from moray.actors.data.token_set import TokenSet, TokenVocabulary, open_token_sets
from moray.models.config import ModelConfig
from moray.models.presets import parameter_count
from moray.pipelines.pretrain.config import PretrainConfig, TrainingJob, model_config, overridden
from moray.pipelines.pretrain.devices import device_text, resolved
from moray.pipelines.pretrain.lr_schedule import batch_plan
from moray.pipelines.pretrain.trainer import fit
from moray.pipelines.pretrain.validate import check_continued, check_job, check_machines, check_recipe, rule_errors
from moray.platform.core.atomic import write_json
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import InputError, StepFailed
from moray.platform.core.events import Event, MetricEvent
from moray.platform.plan.context import StepContext
from moray.platform.plan.memory import MemoryRequest, Progress, StepMemoryPlan
from moray.platform.plan.recipe import PlannedStep, Recipe
from moray.platform.plan.step import Step
from moray.platform.store.artifacts import Artifact
from moray.platform.store.paths import list_folders, remove_folder

_TRAINING = "training.json"


class Pretrain(Step[PretrainConfig]):
    name: ClassVar[str] = "pretrain"
    version: ClassVar[int] = 4  # 4: padding is not routed and adds no expert load; balance is a mean over targets
    Config = PretrainConfig
    inputs: ClassVar[dict[str, str]] = {"tokens": "tokens", "model": "model"}
    optional: ClassVar[frozenset[str]] = frozenset({"model"})  # initial weights; random if not given
    produces: ClassVar[str] = "checkpoint"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def check(self, config: PretrainConfig, inputs: Mapping[str, str]) -> None:
        check_recipe(config, continues="model" in inputs)

    def reads_in_place(self, config: PretrainConfig) -> frozenset[str]:
        return frozenset({"tokens"})

    def placement(self, config: PretrainConfig, topology: Topology) -> str:
        return device_text(check_machines(config, topology))

    def memory(
        self, planned: PlannedStep, recipe: Recipe, request: MemoryRequest, progress: Progress
    ) -> StepMemoryPlan | None:
        from moray.pipelines.pretrain.memory.plan import plan_memory  # imports torch
        from moray.pipelines.pretrain.memory.planned_job import planned_job

        return plan_memory(planned_job(recipe, planned), request, progress)

    def run(self, ctx: StepContext[PretrainConfig]) -> None:
        if ctx.stored and ctx.config.checkpoint.archive:
            raise InputError(
                "pretrain.checkpoint.archive: on a cluster without a shared disk, checkpoints are written to "
                f"{ctx.stored}",
                "remove `archive` from the recipe; checkpoint.keep sets how many are kept",
            )
        tokens = f"{_tokens(ctx).address}/train"
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
            folder=str(ctx.output),
            events=str(ctx.events_folder),
            step=ctx.step,
            initial=ctx.inputs["model"].address if "model" in ctx.inputs else None,
            threads=max(1, topology.cpus // settings.parallel.workers),
            sources=tuple(sorted(sets)),
            held_out=_held_out(ctx.config, tokens),
        )
        size = parameter_count(config)
        parameters = f"{size.total / 1e6:.1f}M parameters, {size.active / 1e6:.1f}M active per token"
        ctx.note(f"{device_text(settings)}; {parameters}")
        if settings.parallel.device == "gpu":
            _check_memory(job, ctx.note)
        try:
            fit(job, tokens, str(ctx.events_folder.parent / "train"), topology)
        except StepFailed as error:
            raise StepFailed(error.message, f"after Ray has stopped, read its logs in {ctx.cluster.logs}") from error
        write_json(ctx.folder / _TRAINING, {"tokenizer": first.vocabulary.tokenizer})
        self._finish(ctx, config, job, sum(token_set.tokens for token_set in sets.values()))

    def _finish(self, ctx: StepContext[PretrainConfig], config: ModelConfig, job: TrainingJob, available: int) -> None:
        """Keeps only the final checkpoint, writes the model's config and the loss curve, and sets the outcome."""
        final = f"step-{job.config.steps:08d}"
        for name in list_folders(ctx.output / "checkpoints"):
            if name != final:
                remove_folder(ctx.output / "checkpoints" / name)
        write_json(ctx.folder / "model.json", dataclasses.asdict(config))
        curve = loss_curve(ctx.events_of(ctx.run.name), ctx.step)
        write_json(ctx.folder / "curve.json", curve)
        trained = batch_plan(job.config, job.sequence_length).before(job.config.steps) * job.sequence_length
        tail = [value for _, value in curve[-10:]]
        ctx.counts |= {"in:tokens": trained, "out:steps": job.config.steps, "available_tokens": available}
        if tail:
            ctx.counts["final_loss"] = sum(tail) / len(tail)
            ctx.outcome = f"loss {curve[0][1]:.3f} -> {ctx.counts['final_loss']:.3f} nats/token, "
        ctx.outcome += f"{trained / available:.2f} epochs"


def _check_memory(job: TrainingJob, note: Callable[[str], None]) -> None:
    """Raises InputError if the job does not fit into the cluster's GPUs. Does nothing if their size is unknown, or the
    job cannot be planned."""
    import ray

    from moray.pipelines.pretrain.memory.gpus import gpu_of
    from moray.pipelines.pretrain.memory.plan import check_memory, unplanned  # imports torch

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if (gpu := gpu_of(resources)) and not unplanned(job.config):
        check_memory(job, gpu, lambda text: note(f"planning memory: {text}"))


def _tokens(ctx: StepContext[PretrainConfig]) -> Artifact:
    """The tokens, with their files on this machine unless they are streamed or read by other hosts."""
    found = ctx.inputs["tokens"]
    return found if ctx.config.stream_tokens or ctx.stored or not found.url else ctx.artifact(found.reference)


def _held_out(config: PretrainConfig, tokens: str) -> HeldOutPlan | None:
    """The held-out sequences that training measures. Raises InputError if there are none."""
    if config.evaluate_every is None:
        return None
    address = f"{tokens.removesuffix('train')}heldout"
    try:
        found = {name: token_set.sequences for name, token_set in open_token_sets(address).items()}
    except (ValueError, FileNotFoundError):
        found = {}
    if not sum(found.values()):
        raise InputError(
            "pretrain.evaluate_every: the tokens have no held-out part",
            "hold out documents (`heldout` of the step split, or of a pretokenized source), or remove evaluate_every",
        )
    return HeldOutPlan.of(address, found, config.evaluate_sequences)


def _open(tokens: str) -> dict[str, TokenSet]:
    try:
        return open_token_sets(tokens)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"pretrain: {error}", "tokenize again (step tokenize)") from error


def _model(ctx: StepContext[PretrainConfig], vocabulary: TokenVocabulary) -> ModelConfig:
    """The config of the model to train, with bos and eos of the tokens. Raises InputError."""
    continues = "model" in ctx.inputs
    config = _input_model(ctx, vocabulary.size) if continues else model_config(ctx.config.model, vocabulary.size)
    return dataclasses.replace(config, bos_token_id=vocabulary.bos, eos_token_id=vocabulary.eos)


def _input_model(ctx: StepContext[PretrainConfig], vocab_size: int) -> ModelConfig:
    """The config of the input model with the recipe's overrides, none of which may change a tensor's shape."""
    from moray.models.checkpoint import CheckedFolder

    with rule_errors("correct `model` or the layout in the recipe"):
        stored = CheckedFolder(ctx.inputs["model"].folder).config
        config = overridden(stored, ctx.config.model)
    check_continued(ctx.config, stored, config, vocab_size, ctx.cluster.topology())
    return config


def loss_curve(events: Iterable[Event], step: str) -> list[tuple[int, float]]:
    """(step, loss) pairs of this run, by step; of a step repeated after a failure, the last loss."""
    losses = {
        event.at: event.value
        for event in events
        if isinstance(event, MetricEvent) and event.name == "train_loss" and event.step == step
    }
    return sorted(losses.items())


def checkpoint_folder(artifact: Path) -> Path:
    """The final checkpoint of a pretrain artifact."""
    return next((artifact / "checkpoints").glob("step-*"))


def read_model_config(artifact: Path) -> ModelConfig:
    return ModelConfig(**json.loads((artifact / "model.json").read_text()))


def read_tokenizer_fingerprint(artifact: Path) -> str:
    """Fingerprint of the tokenizer that encoded a pretrain artifact's tokens."""
    return str(json.loads((artifact / _TRAINING).read_text())["tokenizer"])


step = Pretrain()
