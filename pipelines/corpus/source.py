"""A source of documents in a recipe: its files, and the way to read them."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from moray.pipelines.corpus.file_source import FileSource
from moray.pipelines.corpus.listing import BEYOND, NO_DATA, OTHER_SPLIT, Listing
from moray.pipelines.corpus.readers import ROW_READERS
from moray.pipelines.corpus.rows import Columns

Split = Literal["train", "validation", "test"]

# Names of splits in the folder and file names of Hugging Face datasets.
_SPLITS: dict[str, Split] = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_DATA = re.compile(r"\.(parquet|arrow|jsonl|ndjson)$|\.(jsonl|ndjson)\.(gz|zst)$")


class Source(FileSource):
    """One origin of documents."""

    reader: Literal["text", "jsonl", "parquet", "huggingface", "html", "warc", "pythonbible"] = "text"
    text_column: str = Field("text", min_length=1, description="rows: the column with the text")
    id_column: str | None = Field(
        None, min_length=1, description="rows: the column with the row's id; by default its number"
    )
    url_column: str | None = Field(
        None, min_length=1, description="rows: the column with the URL, stored as `url` in meta"
    )
    license_column: str | None = Field(
        None, min_length=1, description="rows: the column with the license; by default `license` applies to all"
    )
    meta_columns: tuple[str, ...] = Field((), description="rows: columns stored in meta, as strings")
    split: Split = Field("train", description="huggingface: the split to read")
    license: str = Field("", description="license of the documents")
    max_files: int | None = Field(None, gt=0, description="read only the first N files, ordered by path")

    @model_validator(mode="after")
    def _has_reader(self) -> Self:
        if self.reader not in ROW_READERS and self.columns() != Columns():
            raise ValueError(
                f"`text_column` and the other column fields need a reader of rows: {', '.join(ROW_READERS)}"
            )
        if self.reader != "huggingface" and self.split != "train":
            raise ValueError("`split` needs the reader huggingface")
        return self

    def columns(self) -> Columns:
        return Columns(self.text_column, self.id_column, self.url_column, self.license_column, self.meta_columns)

    def listing(self) -> Listing:
        found = super().listing()
        if self.submitted:
            return found
        for key, _ in found.files[self.max_files :] if self.max_files else ():
            found.skip(key, BEYOND)
        found.files = found.files[: self.max_files]
        return found

    def skip_reason(self, key: str) -> str:
        return dataset_skip_reason(key, self.split) if self.reader == "huggingface" else ""


def dataset_skip_reason(key: str, split: Split) -> str:
    """The reason to skip a file of a dataset folder; '' if it holds rows of the split. Cache files of `datasets` do
    not."""
    name = key.rpartition("/")[2]
    if not _DATA.search(name.lower()) or name.startswith(("cache-", ".")):
        return NO_DATA
    return "" if split_of(key) == split else OTHER_SPLIT


def split_of(key: str) -> Split:
    """The split named in the file's name, or else in the nearest folder's name that contains one, or else "train"."""
    for part in reversed(key.lower().split("/")):
        for word in re.split(r"[^a-z]+", part):
            if word in _SPLITS:
                return _SPLITS[word]
    return "train"
