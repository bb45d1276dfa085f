"""tokenizer: trains a byte-level BPE (Hugging Face `tokenizers`) on the training documents.

Byte-level: any text round-trips exactly and no token is unknown. The sample is chosen by a hash of the document id,
so it does not depend on how the corpus is laid out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import xxhash
from pydantic import Field

from moray.pipelines.documents import read_shard, shard_paths
from moray.platform.atomic import write_json
from moray.platform.errors import InputError
from moray.platform.step import Step, StepConfig, StepContext

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
FIM = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")


class TokenizerConfig(StepConfig):
    vocab_size: int = Field(4096, ge=300, description="tokens, special ones included")
    fim: bool = Field(False, description="also tokens that mark a document whose middle comes last (tokenize.fim_rate)")
    sample_bytes: int = Field(50_000_000, gt=0, description="train on about this much text")
    pattern: str = Field(
        # Words with a leading space, runs of digits of at most three, punctuation, and runs of spaces: the split of
        # the GPT family, with digits in threes as DeepSeek-V3 has them.
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        description="regular expression that splits text before merging",
    )


class Tokenizer(Step[TokenizerConfig]):
    name: ClassVar[str] = "tokenizer"
    version: ClassVar[int] = 1
    Config = TokenizerConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "split-documents"}
    produces: ClassVar[str] = "tokenizer"

    def run(self, ctx: StepContext[TokenizerConfig]) -> None:
        paths = shard_paths(ctx.inputs["documents"].folder / "train")
        sample = Sample(paths, ctx.config.sample_bytes)
        tokenizer = train(sample.texts(ctx), ctx.config)
        if tokenizer.get_vocab_size() < ctx.config.vocab_size:
            raise InputError(
                f"the sample of {sample.bytes:,} bytes gives only {tokenizer.get_vocab_size()} tokens, "
                f"vocab_size asks for {ctx.config.vocab_size}",
                "lower vocab_size or use more text",
            )
        tokenizer.save(str(ctx.folder / "tokenizer.json"))
        write_json(ctx.folder / "tokenizer_config.json", hugging_face_config())
        ctx.counts |= {"in:documents": sample.documents, "out:tokens": tokenizer.get_vocab_size()}
        ctx.outcome = f"byte-level BPE on {sample.bytes / 1e6:.1f} MB"


class Sample:
    """Documents whose id hashes below sample_bytes / all bytes."""

    def __init__(self, paths: list[Path], sample_bytes: int) -> None:
        self._paths = paths
        sizes = [sum(len(t.as_py().encode()) for t in read_shard(path, ["text"])["text"]) for path in paths]
        self._share = min(1.0, sample_bytes / max(1, sum(sizes)))
        self.documents = 0
        self.bytes = 0

    def texts(self, ctx: StepContext[TokenizerConfig]) -> Iterator[str]:
        for done, path in enumerate(self._paths):
            ctx.progress("sampling", done, len(self._paths), "shards")
            table = read_shard(path, ["id", "text"])
            for name, text in zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True):
                if xxhash.xxh3_64_intdigest(name.encode()) < self._share * 2**64:
                    self.documents += 1
                    self.bytes += len(text.encode())
                    yield text
        ctx.progress("sampling", len(self._paths), len(self._paths), "shards")


def train(texts: Iterator[str], config: TokenizerConfig) -> Any:
    """A trained `tokenizers.Tokenizer` with bos, eos and pad as ids 0, 1, 2."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(config.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[BOS, EOS, PAD, *(FIM if config.fim else ())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def hugging_face_config() -> dict[str, Any]:
    """`tokenizer_config.json`, so that transformers and the OpenAI-compatible servers load the folder."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20,
    }


def load_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder; does not add special tokens by itself."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    return HuggingFaceTokenizer.from_file(str(folder / "tokenizer.json"))


def special_ids(folder: Path) -> dict[str, int]:
    """Ids of bos, eos and pad (eos, where there is none). Raises InputError for a tokenizer without bos or eos."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    ids = load_tokenizer(folder).get_vocab(with_added_tokens=True)

    def find(kind: str) -> int | None:
        token = config.get(f"{kind}_token")
        return ids.get(token["content"] if isinstance(token, dict) else token)

    bos, eos, pad = find("bos"), find("eos"), find("pad")
    if bos is None or eos is None:
        kind = "bos" if bos is None else "eos"
        raise InputError(
            f"{folder}: tokenizer_config.json names no {kind}_token of its vocabulary", f"add {kind}_token"
        )
    return {"bos": bos, "eos": eos, "pad": eos if pad is None else pad}


step = Tokenizer()
