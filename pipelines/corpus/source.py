"""A source of documents in a recipe, and its files: on this machine, in a package, or in a bucket."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from moray.pipelines.corpus.globs import matches, pattern_error
from moray.pipelines.corpus.listing import (
    BEYOND,
    EXCLUDED,
    NO_DATA,
    NOT_INCLUDED,
    OTHER_SPLIT,
    Listing,
    list_folder,
    printable_name,
)
from moray.pipelines.corpus.readers import ROW_READERS
from moray.pipelines.corpus.rows import Columns
from moray.pipelines.corpus.source_file import File
from moray.platform.core.errors import InputError
from moray.platform.plan.config import ON_HOSTS, StepConfig, operational, user_path
from moray.platform.store.paths import StorePath, bucket_at
from moray.platform.store.submitted import SubmittedFile, read_tree

Split = Literal["train", "validation", "test"]

# Names of splits in the folder and file names of Hugging Face datasets.
_SPLITS: dict[str, Split] = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_DATA = re.compile(r"\.(parquet|arrow|jsonl|ndjson)$|\.(jsonl|ndjson)\.(gz|zst)$")


class Source(StepConfig):
    """One origin of documents: a folder or file (`path`), an installed Python package (`package`), or `url: s3://...`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    path: Path | None = operational(None, description="a folder or file on this machine")
    package: str | None = operational(None, description="an installed Python package")
    url: str | None = operational(None, pattern=r"^s3://[^/?#]+(/[^?#]*)?$", description="s3://bucket/prefix")
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
    include: tuple[str, ...] = Field(("**/*",), description="patterns of paths below the location, as in pathlib")
    exclude: tuple[str, ...] = Field((), description="patterns of paths to skip")
    license: str = Field("", description="license of the documents")
    max_files: int | None = Field(None, gt=0, description="read only the first N files, ordered by path")
    submitted: str = operational("", description="set by `moray submit`: the files of `path` or `package` in the store")
    made_by: str = operational("", description="the command that creates the files, shown if they are missing")

    @field_validator("include", "exclude")
    @classmethod
    def _can_match(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [reason for pattern in value if (reason := pattern_error(pattern))]:
            raise ValueError(wrong[0])
        return value

    @model_validator(mode="after")
    def _one_location(self) -> Source:
        if sum(location is not None for location in (self.path, self.package, self.url)) != 1:
            raise ValueError("give exactly one of `path`, `package` and `url`")
        if self.reader not in ROW_READERS and self.columns() != Columns():
            raise ValueError(
                f"`text_column` and the other column fields need a reader of rows: {', '.join(ROW_READERS)}"
            )
        if self.reader != "huggingface" and self.split != "train":
            raise ValueError("`split` needs the reader huggingface")
        return self

    def columns(self) -> Columns:
        return Columns(self.text_column, self.id_column, self.url_column, self.license_column, self.meta_columns)

    @property
    def is_on_hosts(self) -> bool:
        """Whether the files are those of the cluster's hosts, which this machine may not have."""
        return self.path is not None and str(self.path).startswith(ON_HOSTS)

    def has_files(self) -> bool:
        """Whether the location exists on this machine."""
        return self.path is None or user_path(self.path).exists()

    def location(self) -> str:
        """The location of the files, for messages."""
        return self.url or str(self.root())

    def root(self) -> Path:
        """The folder or file on this machine. Raises InputError if it does not exist."""
        if self.path is not None:
            root = user_path(self.path)
            if not root.exists():
                hint = f"run `{self.made_by}` to create it" if self.made_by else "correct the path in the recipe"
                raise InputError(f"source {self.name!r}: {root.absolute()} does not exist", hint)
            return root.absolute()
        spec = importlib.util.find_spec(str(self.package))
        if spec is None or spec.origin is None:
            raise InputError(
                f"source {self.name!r}: package {self.package!r} is not installed", f"pip install {self.package}"
            )
        return Path(spec.origin).parent

    def files(self) -> list[tuple[str, File]]:
        """(key, file) of every file, sorted by key, the path relative to the root with slashes. Raises InputError."""
        return self.listing().files

    def listing(self) -> Listing:
        """The files, and the skipped ones. Raises InputError."""
        if self.submitted:  # the submitter has applied the rules below
            return Listing([(file.key, _submitted(file)) for file in read_tree(self.submitted)])
        found = self._objects() if self.url is not None else self._paths()
        if self.reader == "huggingface":
            files, found.files = found.files, []
            for key, file in files:
                if reason := _skip_reason(key, self.split):
                    found.skip(key, reason)
                else:
                    found.files.append((key, file))
        for key, _ in found.files[self.max_files :] if self.max_files else ():
            found.skip(key, BEYOND)
        found.files = found.files[: self.max_files]
        return found

    def _paths(self) -> Listing:
        root = self.root()
        try:
            if root.is_file():
                return Listing([(printable_name(root.name), File(str(root), root.stat().st_size))])
            return list_folder(root, self.include, self.exclude)
        except InputError as error:
            raise InputError(f"source {self.name!r}: {error.message}", error.hint) from error
        except OSError as error:
            raise InputError(f"source {self.name!r}: {root}: {error.strerror}", "grant read access") from error

    def _objects(self) -> Listing:
        """The objects below the URL or, if there are none, the object with that URL."""
        url = str(self.url).rstrip("/")
        found = Listing()
        try:
            listed = list(_listed(url))
            if not listed and url.count("/") > 2:
                folder, _, name = url.rpartition("/")
                found.files = [(key, file) for key, file in _listed(folder, name) if key == name]
        except InputError as error:
            raise InputError(f"source {self.name!r}: {error.message}", error.hint) from error
        for key, file in sorted(listed, key=lambda one: one[0]):
            if not any(matches(key, pattern) for pattern in self.include):
                found.skip(key, NOT_INCLUDED)
            elif any(matches(key, pattern) for pattern in self.exclude):
                found.skip(key, EXCLUDED)
            else:
                found.files.append((key, file))
        return found


def _submitted(file: SubmittedFile) -> File:
    if isinstance(file.place, StorePath):
        return File(str(file.place), file.size, root=file.place.root, sha256=file.sha256)
    return File(str(file.place), file.size, sha256=file.sha256)


def _listed(url: str, beginning: str = "") -> Iterator[tuple[str, File]]:
    for item in bucket_at(url).objects(beginning):
        if item.size or not item.key.endswith("/"):  # an empty object represents a folder
            yield item.key, File(f"{url}/{item.key}", item.size, item.etag, url)


def _skip_reason(key: str, split: Split) -> str:
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
