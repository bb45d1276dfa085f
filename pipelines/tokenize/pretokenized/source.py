"""A source of token ids in a recipe: files of Megatron-LM, or a Hugging Face dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from moray.pipelines.corpus.file_source import FileSource
from moray.pipelines.corpus.listing import NO_DATA, Listing
from moray.pipelines.corpus.source import Split, dataset_skip_reason
from moray.pipelines.corpus.source_file import File, content_digest
from moray.pipelines.split import SplitConfig
from moray.platform.core.errors import InputError
from moray.platform.plan.config import operational, user_path

INDEX, DATA = ".idx", ".bin"
_TABLES = (".parquet", ".arrow")


class PretokenizedSource(FileSource):
    """Documents that are token ids already. They must be ids of the step's tokenizer."""

    format: Literal["megatron", "huggingface"] = Field(
        description="megatron: pairs PREFIX.idx and PREFIX.bin; huggingface: Parquet and Arrow files"
    )
    column: str = Field("input_ids", min_length=1, description="huggingface: the column with a list of ids per row")
    split: Split = Field("train", description="huggingface: the split to read")
    bos: Literal["add", "present"] = Field(
        "add", description="add: to documents that do not begin with it; present: every document must begin with it"
    )
    eos: Literal["add", "present"] = Field(
        "add", description="add: to documents that do not end with it; present: every document must end with it"
    )
    heldout: float = Field(0.01, ge=0, lt=1, description="fraction of documents held out")
    salt: str = Field("", description="a different salt holds out other documents")
    compare_by: Literal["content", "date"] = operational(
        "content",
        description="how a changed local file is noticed. content: by its SHA-256, which reads the file; date: by size "
        "and modification time, for terabytes",
    )

    @model_validator(mode="after")
    def _fits_format(self) -> Self:
        if self.format == "megatron" and (self.column, self.split) != ("input_ids", "train"):
            raise ValueError("`column` and `split` need the format huggingface")
        return self

    def held_out(self) -> SplitConfig | None:
        """The rule of the step `split` for this source; None if nothing is held out."""
        return SplitConfig(heldout=self.heldout, salt=self.salt) if self.heldout else None

    def digest(self, file: File) -> str:
        """What tells this file from a changed one: its content, or its modification time."""
        if self.compare_by == "date" and not file.is_object and not file.sha256:
            return f"modified:{Path(file.location).stat().st_mtime_ns}"
        return content_digest(file)

    def patterns(self) -> tuple[Sequence[str], Sequence[str]]:
        if self.format != "megatron":
            return self.include, self.exclude
        return _of_pairs(self.include), _of_pairs(self.exclude)

    def names_at(self, name: str) -> Sequence[str]:
        stem = _stem(name)
        return (stem + INDEX, stem + DATA) if self.format == "megatron" else (name,)

    def skip_reason(self, key: str) -> str:
        if self.format == "megatron":
            return ""
        return dataset_skip_reason(key, self.split) if key.lower().endswith(_TABLES) else NO_DATA

    def has_files(self) -> bool:
        return super().has_files() or bool(self._pair())

    def _paths(self) -> Listing:
        return Listing(pair) if (pair := self._pair()) else super()._paths()

    def _pair(self) -> list[tuple[str, File]]:
        """The files of `path`, if it is a prefix or one of the two files of a pair."""
        if self.format != "megatron" or self.path is None or (path := user_path(self.path).absolute()).is_dir():
            return []
        files = [path.with_name(name) for name in self.names_at(path.name)]
        return [(file.name, File(str(file), file.stat().st_size)) for file in files if file.is_file()]

    def pairs(self) -> list[tuple[str, File, File]]:
        """(key without suffix, index, data) of every pair of Megatron files, sorted. Raises InputError for half a
        pair."""
        found = dict(self.files())
        stems = sorted({_stem(key) for key in found})
        for stem in stems:
            for here, missing in ((INDEX, DATA), (DATA, INDEX)):
                if stem + missing not in found:
                    raise InputError(
                        f"source {self.name!r}: {stem + here} has no {stem + missing} beside it",
                        "Megatron-LM writes both; add the missing file, or exclude this one",
                    )
        return [(stem, found[stem + INDEX], found[stem + DATA]) for stem in stems]


def _stem(name: str) -> str:
    return name.removesuffix(INDEX).removesuffix(DATA)


def _of_pairs(patterns: Sequence[str]) -> list[str]:
    """Patterns of prefixes or of one file of a pair, as patterns of both files."""
    return [_stem(pattern) + suffix for pattern in patterns for suffix in (INDEX, DATA)]
