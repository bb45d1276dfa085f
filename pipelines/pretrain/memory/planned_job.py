"""The job of a pretrain step of a recipe, before its inputs exist: vocabulary and sequence length from the steps that
will make them."""

from __future__ import annotations

import json

from moray.models.config import ModelConfig
from moray.pipelines.pretrain.config import PretrainConfig, TrainingJob, model_config, overridden
from moray.platform.core.errors import InputError
from moray.platform.plan.config import user_path
from moray.platform.plan.recipe import PlannedStep, Recipe


def planned_job(recipe: Recipe, planned: PlannedStep) -> TrainingJob:
    """Raises InputError if the recipe does not say what the model is."""
    config = planned.config
    assert isinstance(config, PretrainConfig)
    steps = {step.key: step for step in recipe.steps}
    tokens = steps[planned.inputs["tokens"]]
    length = getattr(tokens.config, "sequence_length", None)
    if length is None:
        raise InputError(
            f"{planned.key}: the length of sequences is unknown, since {tokens.key} is no step `tokenize`",
            "plan a recipe that tokenizes",
        )
    return TrainingJob(config, _model(steps, planned), length, "/nonexistent/run", "", planned.key, threads=1)


def _model(steps: dict[str, PlannedStep], planned: PlannedStep) -> ModelConfig:
    config = planned.config
    assert isinstance(config, PretrainConfig)
    if "model" not in planned.inputs:
        return model_config(config.model, _vocabulary(steps, planned))
    return overridden(_made_by(steps, steps[planned.inputs["model"]]), config.model)


def _made_by(steps: dict[str, PlannedStep], source: PlannedStep) -> ModelConfig:
    """The config of a model that a step makes."""
    if "checkpoint" in source.inputs:  # export
        return _model(steps, steps[source.inputs["checkpoint"]])
    path = getattr(source.config, "path", None)  # import-model
    if path is None or not (file := user_path(path) / "config.json").is_file():
        raise InputError(
            f"{source.key}: the shape of its model is unknown before it has run", "run the recipe up to this step"
        )
    return ModelConfig.from_hf(json.loads(file.read_text()))


def _vocabulary(steps: dict[str, PlannedStep], planned: PlannedStep) -> int:
    tokenizer = steps[steps[planned.inputs["tokens"]].inputs["tokenizer"]]
    if "model" in tokenizer.inputs:  # model-tokenizer
        return _made_by(steps, steps[tokenizer.inputs["model"]]).vocab_size
    size = getattr(tokenizer.config, "vocab_size", None)
    if size is None:
        raise InputError(
            f"{tokenizer.key}: the size of its vocabulary is unknown before it has run", "use the step `tokenizer`"
        )
    return int(size)
