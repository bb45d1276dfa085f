"""Evals: files of items (JSON lines or Parquet), and the texts of an item that a corpus must not contain.

Anything unreadable is an error, because an eval that is read only in part would silently miss contamination.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from moray.pipelines.corpus.globs import pattern_error
from moray.pipelines.corpus.listing import list_folder
from moray.pipelines.corpus.source_file import File, trailing_data
from moray.platform.core.errors import InputError, nearest
from moray.platform.plan.config import StepConfig, operational, user_path

_IDS = ("task_id", "id", "question_id", "qid")
# File types that may hold items but are not supported, and names of such files that hold none.
_OTHER_DATA = (
    ".json", ".json.gz", ".json.zst", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".arrow", ".xlsx", ".jsonl.bz2",
    ".jsonl.xz",
)  # fmt: skip
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "package.json")
_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")


class EvalSet(StepConfig):
    """One eval: a file or folder (`path`), or the data in an installed Python package (`package`)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    path: Path | None = operational(None)
    package: str | None = operational(None)
    include: str = Field("**/*", description="glob of the JSON lines and Parquet files in a folder or package")
    fields: tuple[str, ...] = Field((), description="fields to search for; default: every string except the id")
    id_field: str | None = Field(None, min_length=1, description="field with the item id; default: task_id, id, or row")

    @field_validator("include")
    @classmethod
    def _can_match(cls, value: str) -> str:
        if reason := pattern_error(value):
            raise ValueError(reason)
        return value

    @model_validator(mode="after")
    def _one_place(self) -> EvalSet:
        if (self.path is None) == (self.package is None):
            raise ValueError("set exactly one of `path` and `package`")
        return self

    def root(self) -> Path:
        """The local folder or file. Raises InputError if it does not exist."""
        if self.path is not None:
            root = user_path(self.path)
            if not root.exists():
                raise InputError(f"eval {self.name!r}: {root} does not exist", "correct the path in the recipe")
            return root.absolute()
        spec = importlib.util.find_spec(str(self.package))
        if spec is None or spec.origin is None:
            raise InputError(
                f"eval {self.name!r}: package {self.package!r} is not installed", f"pip install {self.package}"
            )
        return Path(spec.origin).parent

    def files(self) -> list[tuple[str, Path]]:
        """(key, path) of every file of items, sorted; the key is relative to the root.

        Raises InputError if there is none, or if an unsupported file may hold items too.
        """
        root = self.root()
        try:
            found = [(root.name, root)] if root.is_file() else self._below(root)
        except InputError as error:
            raise InputError(f"eval {self.name!r}: {error.message}", error.hint) from error
        files = [(key, path) for key, path in found if _is_lines(path) or _is_parquet(path)]
        unread = [key for key, path in found if path.name.lower().endswith(_OTHER_DATA) and path.name not in _ABOUT]
        if files and unread:
            raise InputError(
                f"eval {self.name!r}: {', '.join(unread[:3])} of {len(unread)} in {root} cannot be read as items",
                "convert them to JSON lines or Parquet, or select the item files with `include`, such as '**/*.jsonl'",
            )
        if not files:
            raise InputError(
                f"eval {self.name!r}: no JSON lines or Parquet file matches {self.include!r} in {root}",
                f"supported file types: {', '.join((*_LINES, '.parquet'))}",
            )
        return files

    def _below(self, root: Path) -> list[tuple[str, Path]]:
        listing = list_folder(root, [self.include], [])
        return [(key, Path(file.location)) for key, file in listing.files]

    def check(self) -> None:
        """Checks that files exist and that the first item of each has all named fields. Raises InputError."""
        for _, path in self.files():
            for number, row in itertools.islice(_rows(path), 1):
                where = f"eval {self.name!r}: {path}, item {number + 1}"
                for name in (*self.fields, *([self.id_field] if self.id_field else [])):
                    _field(_object(row, where), name, where)


@dataclass(frozen=True)
class EvalText:
    """One text of an item. eval, item: the names of the eval and the item. field: the path of the text in the item."""

    eval: str
    item: str
    field: str
    text: str


def read_pieces(evals: EvalSet) -> Iterator[EvalText]:
    """Yields the texts of all items, in order. Raises InputError, with file and line, for unreadable items."""
    files = evals.files()
    seen: set[str] = set()
    for key, path in files:
        for number, row in _rows(path):
            where = f"eval {evals.name!r}: {path}, item {number + 1}"
            row = _object(row, where)  # noqa: PLW2901
            item = ("" if len(files) == 1 else f"{key}:") + _name(row, evals.id_field, number, where)
            if item in seen:  # repeated ids are different items, which are counted separately
                item = f"{item} (item {number + 1})"
            seen.add(item)
            if evals.fields:
                fields = {name: _field(row, name, where) for name in evals.fields}
            else:
                fields = {name: value for name, value in row.items() if name not in (*_IDS, evals.id_field)}
            for name, value in fields.items():
                for field, text in _strings(name, value):
                    yield EvalText(evals.name, item, field, text)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(_parquet(path) if _is_parquet(path) else _lines(path))
    except RecursionError as error:
        raise InputError(f"{path}: an item is nested too deeply", "flatten the items of this file") from error
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        raise InputError(f"{path}: {error}", "repair the file: every item of an eval must be readable") from error


def _parquet(path: Path) -> Iterator[Any]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def _lines(path: Path) -> Iterator[Any]:
    with File(str(path)).stream() as stream:
        for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig")):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number + 1}: {error}") from error
        for found in trailing_data(stream):
            raise ValueError(found.detail)


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object", "write each item as an object with named fields")
    return row


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    """The value of a field, by name or by a path such as `choices.text`. Raises InputError if it is missing."""
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise InputError(f"{where} has no field {name!r}", nearest(name, row))
        value = value[part]
    return value


def _name(row: dict[str, Any], id_field: str | None, number: int, where: str) -> str:
    if id_field is not None:
        return str(_field(row, id_field, where))
    return str(next((row[name] for name in _IDS if row.get(name) is not None), number))


def _strings(field: str, value: Any) -> Iterator[tuple[str, str]]:
    """(path, string) of every string in a value. Lone surrogates become "?"."""
    if isinstance(value, str):
        yield field, value.encode(errors="replace").decode()
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(f"{field}.{name}", inner)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _strings(f"{field}.{i}", inner)


def _is_lines(path: Path) -> bool:
    return path.name.lower().endswith(_LINES)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"
