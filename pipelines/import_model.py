"""import-model: an existing checkpoint in the Hugging Face DeepSeek-V3 layout, for serving or continued pretraining.

Every tensor is read and checked against the config before anything is copied. Weights are copied bit for bit, FP8
weights as FP8, unless `precision` requests a conversion, which runs one tensor at a time. Exactly the files that were
checked are copied (`models/files.py`): weights in sub-folders keep their paths, and other weights are not copied.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from moray.models.files import model_files, read_object
from moray.pipelines.shared.chat_files import TEMPLATE
from moray.pipelines.shared.weight_audit import audit_counts, audit_text
from moray.pipelines.tokenizer.bos import CONFIG, TOKENIZER, adds_bos_token, named_token, processor_bos, write_with_bos
from moray.pipelines.tokenizer.train import load_tokenizer
from moray.platform.core.errors import InputError
from moray.platform.plan.config import StepConfig, operational, user_path
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Step
from moray.platform.store.manifest import hash_file

# Files of a model besides weights and config.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "special_tokens_map.json",
    "chat_template*",
    "LICENSE*",
    "README*",
)
_COPY_BYTES = 16_000_000
_WEIGHTS = (".safetensors", ".bin")


class ImportConfig(StepConfig):
    path: Path = operational(..., description="folder in the Hugging Face layout")
    precision: Literal["as-is", "float32", "bf16", "fp8"] = Field(
        "as-is", description="as-is: copy the weights unchanged; else convert them"
    )
    chat_template: Path | None = operational(None, description="file of a chat template to use, instead of its own")


class ImportModel(Step[ImportConfig]):
    name: ClassVar[str] = "import-model"
    version: ClassVar[int] = 2  # 2: copies only files that were checked; makes the two bos settings consistent
    Config = ImportConfig
    produces: ClassVar[str] = "model"

    def external(self, config: ImportConfig) -> list[ExternalFile]:
        folder = user_path(config.path)
        paths = [(name, folder / name) for name in _files(folder, config.precision)]
        found = [ExternalFile("model", name, path.stat().st_size, hash_file(path)) for name, path in paths]
        if config.chat_template is not None:
            path = user_path(config.chat_template)
            found.append(ExternalFile("chat-template", TEMPLATE, path.stat().st_size, hash_file(path)))
        return found

    def run(self, ctx: StepContext[ImportConfig]) -> None:
        from moray.models.checkpoint import CheckedFolder, write_weights
        from moray.models.presets import parameter_count

        folder = user_path(ctx.config.path)
        try:
            checked = CheckedFolder(folder)
            if ctx.config.precision == "as-is":
                for _ in _with_progress(ctx, "checking", checked):
                    pass
                audit = checked.audit
                _copy(ctx, folder, model_files(folder))
            else:
                weights = _with_progress(ctx, "converting", checked)
                audit = write_weights(ctx.folder, checked.config, weights, ctx.config.precision)
        except (ValueError, FileNotFoundError) as error:
            raise InputError(
                str(error), "the folder must hold a DeepSeek-V3 model in the Hugging Face layout"
            ) from error
        _copy(ctx, folder, _companions(folder, ctx.config.precision))
        if ctx.config.chat_template is not None:
            (ctx.folder / TEMPLATE).unlink(missing_ok=True)  # it may be a link to the model's own
            shutil.copyfile(user_path(ctx.config.chat_template), ctx.folder / TEMPLATE)
        _agree_on_bos(ctx, read_object(folder / "config.json").get("bos_token_id"))
        size = parameter_count(checked.config)
        ctx.counts |= {"out:parameters": size.total + size.mtp, "active_parameters": size.active}
        ctx.counts |= audit_counts(audit)
        precision = checked.precision if ctx.config.precision == "as-is" else ctx.config.precision
        parameters = f"{size.total / 1e6:,.1f}M parameters ({size.active / 1e6:,.1f}M active), {precision}"
        ctx.outcome = f"{parameters}; {audit_text(audit)}"


def _agree_on_bos(ctx: StepContext[ImportConfig], stated: Any) -> None:
    """Makes both tokenizer files put bos before a text if one of them does, because readers use one or the other.

    stated: bos_token_id of config.json, if it has one. Files that contradict each other are left unchanged, with a
    warning.
    """
    if not all((ctx.folder / name).is_file() for name in (TOKENIZER, CONFIG)):
        return
    try:
        tokenizer = load_tokenizer(ctx.folder)
        first, configured = processor_bos(tokenizer, stated), adds_bos_token(ctx.folder)
        index = named_token(ctx.folder, "bos", tokenizer) if first is None else first
    except Exception as error:  # the library raises bare Exception
        ctx.note(f"Moray cannot serve this tokenizer: {error}", level="warning")
        return
    if configured is not False if first is not None else not configured:
        return
    if index is None or stated not in (None, index):
        found = "no token of the vocabulary" if index is None else f"id {index}"
        ctx.note(
            f"bos differs: {CONFIG} has {found}, config.json id {stated}; the tokenizer's files are left unchanged",
            level="warning",
        )
        return
    write_with_bos(ctx.folder, ctx.folder, tokenizer.id_to_token(index), index)
    one, other = (CONFIG, TOKENIZER) if first is None else (TOKENIZER, CONFIG)
    ctx.note(f"changed {other} to put bos before a text, as {one} does")


def _files(folder: Path, precision: str) -> list[str]:
    """Names of config, index and weights, then of companion files. Raises InputError if the folder has no model."""
    if not (folder / "config.json").is_file():
        reason = "contains no config.json" if folder.is_dir() else "is not a folder"
        raise InputError(f"import-model.path: {folder} {reason}", "set path to a folder in the Hugging Face layout")
    try:
        return [*model_files(folder), *_companions(folder, precision)]
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error), "the folder must hold a DeepSeek-V3 model in the Hugging Face layout") from error


def _companions(folder: Path, precision: str) -> list[str]:
    """Files of the model besides config and weights. Includes Python code if a copied config refers to it."""
    configs = [CONFIG, *(["config.json"] if precision == "as-is" else [])]
    coded = any("auto_map" in read_object(folder / name) for name in configs if (folder / name).is_file())
    patterns = (*_COMPANIONS, "*.py") if coded else _COMPANIONS
    found = (path for path in folder.iterdir() if path.is_file())
    return sorted(path.name for path in found if any(path.match(pattern) for pattern in patterns))


def _with_progress(ctx: StepContext[ImportConfig], phase: str, checked: Any) -> Iterator[Any]:
    from moray.models.tensors import checkpoint_shapes

    total = len(checkpoint_shapes(checked.config))
    for done, weight in enumerate(checked.weights(), start=1):
        yield weight
        ctx.progress(phase, done, total, "tensors")


def _copy(ctx: StepContext[ImportConfig], folder: Path, names: list[str]) -> None:
    total = sum((folder / name).stat().st_size for name in names)
    done = 0
    in_store = folder.is_relative_to(ctx.home.artifacts)
    for name in names:
        (ctx.folder / name).parent.mkdir(parents=True, exist_ok=True)
        if in_store and name.endswith(_WEIGHTS) and _link(folder / name, ctx.folder / name):
            done += (folder / name).stat().st_size
            continue
        with (folder / name).open("rb") as source, (ctx.folder / name).open("wb") as target:
            while part := source.read(_COPY_BYTES):
                target.write(part)
                done += len(part)
                ctx.progress("copying", done, total, "bytes")
        shutil.copymode(folder / name, ctx.folder / name)


def _link(source: Path, target: Path) -> bool:
    """Makes `target` the same file as `source`, a file of an artifact, which nobody changes. Returns False if the file
    system cannot."""
    try:
        target.hardlink_to(source)
    except OSError:
        return False
    return True


step = ImportModel()
