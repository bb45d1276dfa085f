"""tokenizer: trains a byte-level BPE (Hugging Face `tokenizers`) on the training documents.

Byte-level: any text round-trips exactly and there is no unknown token. The sample is chosen by a hash of the document
id, so it does not depend on the layout of the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import xxhash
from pydantic import Field, field_validator

from moray.pipelines.shared.documents import read_shard, shard_paths, text_bytes
from moray.pipelines.tokenizer.bos import named_token
from moray.pipelines.tokenizer.bpe import train_in_subprocess
from moray.platform.core.atomic import write_json
from moray.platform.core.errors import InputError
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step
from moray.platform.store.paths import AnyPath, in_threads, local_file

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
FIM = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")


# DeepSeek-V3's split pattern: digits in threes; runs of Chinese and Japanese; words with the character before them,
# punctuation with line ends after it, line ends, spaces. It must match its tokenizer.json character by character,
# because the fast encoder recognises the pattern by its text.
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


class TokenizerConfig(StepConfig):
    vocab_size: int = Field(4096, ge=300, description="number of tokens, including special tokens and 256 bytes")
    fim: bool = Field(False, description="add the fill-in-the-middle tokens that tokenize.fim_rate requires")
    sample_bytes: int = Field(50_000_000, gt=0, description="approximate bytes of text to train on")
    pattern: tuple[str, ...] = Field(
        DEEPSEEK_V3, description="regular expressions that split text before merging; each splits the previous pieces"
    )

    @property
    def special(self) -> tuple[str, ...]:
        return (BOS, EOS, PAD, *(FIM if self.fim else ()))

    @field_validator("pattern", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from tokenizers import Regex

        for pattern in value:
            try:
                Regex(pattern)
            except Exception as error:  # the library raises bare Exception
                raise ValueError(f"{pattern!r} is not a valid Oniguruma regular expression: {error}") from error
        return value


class Tokenizer(Step[TokenizerConfig]):
    name: ClassVar[str] = "tokenizer"
    version: ClassVar[int] = 3  # 2: DeepSeek-V3's split pattern. 3: long runs without a split are learnt in parts
    Config = TokenizerConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "split-documents"}
    produces: ClassVar[str] = "tokenizer"

    def reads_in_place(self, config: TokenizerConfig) -> frozenset[str]:
        return frozenset({"documents"})

    def run(self, ctx: StepContext[TokenizerConfig]) -> None:
        paths = shard_paths(ctx.inputs["documents"].location / "train")
        sample = Sample(paths, ctx.config.sample_bytes)
        if not sample.size:
            raise InputError(
                "tokenizer: the training documents contain no text", "check the counts of the steps before it"
            )
        path = ctx.folder / "tokenizer.json"

        def progress(stage: str, done: int, total: int) -> None:
            ctx.progress(stage, done, total, "merges" if "merge" in stage else "words")

        train_in_subprocess(
            sample.texts(ctx), ctx.config.pattern, ctx.config.vocab_size, ctx.config.special, path, progress
        )
        tokenizer = load_tokenizer(ctx.folder)
        if tokenizer.get_vocab_size() < ctx.config.vocab_size:
            raise InputError(
                f"tokenizer.vocab_size: the sample of {sample.bytes:,} bytes gives only {tokenizer.get_vocab_size()} "
                f"tokens instead of {ctx.config.vocab_size}",
                "lower vocab_size or use more text",
            )
        write_json(ctx.folder / "tokenizer_config.json", hugging_face_config())
        ctx.counts |= {"in:documents": sample.documents, "out:tokens": tokenizer.get_vocab_size()}
        ctx.outcome = f"byte-level BPE on {sample.bytes / 1e6:.1f} MB"


class Sample:
    """A sample: the documents whose id hash is below sample_bytes / all bytes. size: bytes of all documents.
    documents, bytes: size of the sample that `texts` has returned so far."""

    def __init__(self, paths: list[AnyPath], sample_bytes: int) -> None:
        self._paths = paths
        self.size = sum(in_threads(lambda path: text_bytes(read_shard(path, ["text"])["text"]), paths, most=4))
        self._share = min(1.0, sample_bytes / max(1, self.size))
        self.documents = 0
        self.bytes = 0

    def texts(self, ctx: StepContext[TokenizerConfig]) -> Iterator[str]:
        for done, path in enumerate(self._paths):
            ctx.progress("sampling", done, len(self._paths), "shards")
            names, limit = read_shard(path, ["id"])["id"].to_pylist(), self._share * 2**64
            rows = [n for n, name in enumerate(names) if xxhash.xxh3_64_intdigest(name.encode()) < limit]
            for text in read_shard(path, ["text"])["text"].take(rows) if rows else ():
                self.documents += 1
                self.bytes += text.as_buffer().size
                yield text.as_py()
        ctx.progress("sampling", len(self._paths), len(self._paths), "shards")


def train_tokenizer(texts: Iterator[str], config: TokenizerConfig) -> Any:
    """A trained `tokenizers.Tokenizer` with bos, eos and pad as ids 0, 1, 2. Trains in this process."""
    from moray.pipelines.tokenizer import bpe

    return bpe.train_bpe(texts, config.pattern, config.vocab_size, config.special)


def hugging_face_config() -> dict[str, Any]:
    """Contents of `tokenizer_config.json`, so that transformers and OpenAI-compatible servers can load the folder."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
    }


def load_tokenizer(folder: AnyPath) -> Any:
    """The `tokenizers.Tokenizer` of a folder, without the truncation and padding of its file, as in transformers.
    Raises ValueError for a file that is none."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    with local_file(folder / "tokenizer.json") as local:
        try:
            tokenizer = HuggingFaceTokenizer.from_file(str(local))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def id_count(tokenizer: Any) -> int:
    """Number of rows that a model's embedding needs: the highest id plus one. There may be unused ids below it."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


class NoPad(InputError):
    """The tokenizer has no free token for padding, that is, none that documents never contain."""


def special_ids(folder: Path) -> dict[str, int]:
    """Ids of bos, eos and pad.

    If the configured pad is missing or can occur in documents (bos, eos, the unknown token), a token with "pad" in its
    name is used, or else the last free control token. Raises NoPad if there is none, InputError without bos and eos.
    """
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    try:
        bos, eos, pad = (named_token(folder, kind, tokenizer) for kind in ("bos", "eos", "pad"))
    except ValueError as error:
        raise InputError(str(error), "use a tokenizer_config.json of Hugging Face") from error
    if bos is None or eos is None:
        kind = "bos" if bos is None else "eos"
        raise InputError(
            f"{folder}: tokenizer_config.json has no {kind}_token that is in the vocabulary", f"add {kind}_token"
        )
    if bos == eos:
        raise InputError(
            f"{folder}: bos_token and eos_token are the same token, {bos}", "set them to two different tokens"
        )
    held = {bos, eos, _unknown(tokenizer, ids)}
    if pad is None or pad in held:
        names = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        free = [i for i in names if i not in held and not names[i].isspace()]
        pad = min((i for i in free if "pad" in names[i].lower()), default=max(free, default=None))
    if pad is None:
        raise NoPad(
            f"{folder}: no token is free for padding: documents contain bos, eos and the unknown token",
            "add a special token to tokenizer.json and set it as pad_token in tokenizer_config.json",
        )
    return {"bos": bos, "eos": eos, "pad": pad}


def _unknown(tokenizer: Any, ids: dict[str, int]) -> int | None:
    """The unknown token, which replaces text outside the vocabulary; None if the vocabulary has all bytes."""
    if getattr(tokenizer.model, "byte_fallback", False) and all(f"<0x{i:02X}>" in ids for i in range(256)):
        return None
    return ids.get(getattr(tokenizer.model, "unk_token", None) or "")


def add_pad(folder: Path) -> int | None:
    """Adds a padding token to a folder's files if no token is free. Returns its id, or None. Raises as `special_ids`
    for other errors."""
    try:
        special_ids(folder)
    except NoPad:
        number = id_count(load_tokenizer(folder))
        path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        content["added_tokens"] = [
            *(content.get("added_tokens") or []),
            {"id": number, "content": PAD, **plain, "special": True},
        ]
        write_json(path, content)
        write_json(config, {**json.loads(config.read_text(encoding="utf-8")), "pad_token": PAD})
        return number
    return None


step = Tokenizer()
