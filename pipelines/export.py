"""export: converts a training checkpoint to the Hugging Face DeepSeek-V3 layout, and adds the tokenizer.

It converts one tensor at a time, so memory does not grow with the model. transformers, vLLM and llama.cpp's converter
can read the folder (docs/models.md lists the converter's options). All of them put bos before a text, as in training.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from moray.pipelines.pretrain.step import checkpoint_folder, read_model_config, read_tokenizer_fingerprint
from moray.pipelines.shared.chat_files import PLAIN_CHAT, TEMPLATE
from moray.pipelines.shared.weight_audit import audit_counts, audit_text
from moray.pipelines.tokenizer.bos import CONFIG, read_object_or_empty, write_with_bos
from moray.pipelines.tokenizer.train import load_tokenizer, special_ids
from moray.platform.core.atomic import write_json
from moray.platform.core.errors import InputError
from moray.platform.plan.config import StepConfig, added
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step


class ExportConfig(StepConfig):
    precision: Literal["float32", "bf16", "fp8"] = "float32"
    weights: Literal["last", "ema"] = Field(
        "last", description="weights of the last step, or their exponential moving average (EMA)"
    )
    chat_template: Literal["none", "plain"] = added(
        "none", description="how messages become a prompt, unless the tokenizer has a template: as a plain dialogue"
    )


class Export(Step[ExportConfig]):
    name: ClassVar[str] = "export"
    version: ClassVar[int] = 2  # 2: tokenizer.json puts bos before a text
    Config = ExportConfig
    inputs: ClassVar[dict[str, str]] = {"checkpoint": "checkpoint", "tokenizer": "tokenizer"}
    produces: ClassVar[str] = "model"

    def run(self, ctx: StepContext[ExportConfig]) -> None:
        from moray.models import checkpoint as hugging_face
        from moray.models.presets import parameter_count

        source, tokenizer = ctx.inputs["checkpoint"].folder, ctx.inputs["tokenizer"]
        if read_tokenizer_fingerprint(source) != tokenizer.fingerprint:
            raise InputError(
                "export: the tokenizer is not the one that the model was trained with",
                "use the same tokenizer as the step tokenize",
            )
        config = read_model_config(source)
        audit = hugging_face.write_folder(ctx.folder, config, _tensors(ctx), ctx.config.precision)
        bos = special_ids(tokenizer.folder)["bos"]
        write_with_bos(tokenizer.folder, ctx.folder, load_tokenizer(tokenizer.folder).id_to_token(bos), bos)
        if ctx.config.chat_template == "plain" and "chat_template" not in read_object_or_empty(ctx.folder / CONFIG):
            shutil.copyfile(PLAIN_CHAT, ctx.folder / TEMPLATE)
        write_json(
            ctx.folder / "generation_config.json",
            {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "do_sample": True},
        )
        size = parameter_count(config)
        ctx.counts |= {"out:parameters": size.total, "active_parameters": size.active, **audit_counts(audit)}
        parameters = f"{size.total / 1e6:.1f}M parameters ({size.active / 1e6:.1f}M active), {ctx.config.precision}"
        ctx.outcome = f"{parameters}; {audit_text(audit)}"


def _tensors(ctx: StepContext[ExportConfig]) -> Iterator[tuple[str, Any]]:
    """(name, tensor in its final shape) of every weight; reports progress."""
    from moray.models.tensors import checkpoint_shapes
    from moray.pipelines.pretrain.checkpoint.checkpoints import CheckpointFailed
    from moray.pipelines.pretrain.checkpoint.stored_weights import read_weights

    source = ctx.inputs["checkpoint"].folder
    shapes = checkpoint_shapes(read_model_config(source))
    kind = "master" if ctx.config.weights == "last" else "ema"
    try:
        for done, (name, tensor) in enumerate(read_weights(checkpoint_folder(source), kind)):
            ctx.progress("writing", done + 1, len(shapes), "tensors")
            yield name, tensor.view(shapes[name])
    except CheckpointFailed as error:
        hint = "set pretrain.ema_half_life_tokens" if kind == "ema" else "remove the artifact and run again"
        raise InputError(f"export: {error}", hint) from error


step = Export()
