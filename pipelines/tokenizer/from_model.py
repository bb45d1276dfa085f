"""model-tokenizer: the tokenizer of an imported model, to tokenize text for its continued pretraining."""

from __future__ import annotations

import shutil
from typing import ClassVar

from moray.pipelines.tokenizer.train import load_tokenizer, special_ids
from moray.platform.core.errors import InputError
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step


class ModelTokenizerConfig(StepConfig):
    pass


class ModelTokenizer(Step[ModelTokenizerConfig]):
    name: ClassVar[str] = "model-tokenizer"
    version: ClassVar[int] = 2  # 2: the unknown token is not used for padding
    Config = ModelTokenizerConfig
    inputs: ClassVar[dict[str, str]] = {"model": "model"}
    produces: ClassVar[str] = "tokenizer"

    def run(self, ctx: StepContext[ModelTokenizerConfig]) -> None:
        source = ctx.inputs["model"].folder
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (source / name).is_file():
                raise InputError(
                    f"{ctx.inputs['model'].reference} has no {name}", f"add {name} to the folder and import it again"
                )
            shutil.copyfile(source / name, ctx.folder / name)
        special_ids(ctx.folder)
        size = load_tokenizer(ctx.folder).get_vocab_size()
        ctx.counts |= {"out:tokens": size}
        ctx.outcome = f"{size:,} tokens"


step = ModelTokenizer()
