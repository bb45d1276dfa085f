"""Evals: files of items, JSON lines or Parquet, and the texts in an item that a corpus must not hold.

An eval that is read in part would let contamination through without a word, so what cannot be read is an error, never a
count.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from moray.platform.errors import InputError, nearest
from moray.platform.step import StepConfig, operational

_IDS = ("task_id", "id", "question_id", "qid")
_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")


class EvalSet(StepConfig):
    """One eval: a file or folder (`path`), or the data in an installed Python package (`package`)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    path: Path | None = operational(None)
    package: str | None = operational(None)
    include: str = Field("**/*", description="in a folder or package: which of its JSON lines and Parquet files")
    fields: tuple[str, ...] = Field((), description="whose texts are looked for; default: every string but the id")
    id_field: str | None = Field(None, min_length=1, description="what names an item; default: task_id, id, or its row")

    @model_validator(mode="after")
    def _one_place(self) -> EvalSet:
        if (self.path is None) == (self.package is None):
            raise ValueError("give `path` or `package`, one of them")
        return self

    def root(self) -> Path:
        """The folder (or file) on this machine. Raises InputError if it is not there."""
        if self.path is not None:
            root = self.path.expanduser()
            if not root.exists():
                raise InputError(f"eval {self.name!r}: {root} does not exist", "correct the path in the recipe")
            return root.absolute()
        spec = importlib.util.find_spec(str(self.package))
        if spec is None or spec.origin is None:
            raise InputError(f"eval {self.name!r}: no package {self.package!r}", f"pip install {self.package}")
        return Path(spec.origin).parent

    def files(self) -> list[tuple[str, Path]]:
        """(key, path) of every file of items, sorted; the key is relative to the root. Raises InputError for none."""
        root = self.root()
        if root.is_file():
            found = [(root.name, root)]
        else:
            found = sorted((path.relative_to(root).as_posix(), path) for path in root.glob(self.include))
        files = [(key, path) for key, path in found if path.is_file() and _is_lines(path) | _is_parquet(path)]
        if not files:
            raise InputError(
                f"eval {self.name!r}: no JSON lines or Parquet file matches {self.include!r} in {root}",
                f"files end in {', '.join((*_LINES, '.parquet'))}",
            )
        return files


@dataclass(frozen=True)
class Piece:
    """One text of an item: (eval, item) name the item, `field` where in it the text stands."""

    eval: str
    item: str
    field: str
    text: str


def read_pieces(evals: EvalSet) -> Iterator[Piece]:
    """The texts of all items, in order. Raises InputError, with file and line, for what cannot be read."""
    files = evals.files()
    for key, path in files:
        for number, row in _rows(path):
            where = f"eval {evals.name!r}: {path}, item {number + 1}"
            if not isinstance(row, dict):
                raise InputError(f"{where} is no object", "an item is an object with named fields")
            item = ("" if len(files) == 1 else f"{key}:") + _name(row, evals.id_field, number, where)
            if evals.fields:
                fields = {name: _field(row, name, where) for name in evals.fields}
            else:
                fields = {name: value for name, value in row.items() if name not in (*_IDS, evals.id_field)}
            for name, value in fields.items():
                for field, text in _strings(name, value):
                    yield Piece(evals.name, item, field, text)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(_parquet(path) if _is_parquet(path) else _lines(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path}: {error}", "evals must be whole: what is not read is not looked for") from error


def _parquet(path: Path) -> Iterator[Any]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024):
            yield from batch.to_pylist()


def _lines(path: Path) -> Iterator[Any]:
    with pa.input_stream(str(path), compression="detect") as stream:
        for number, line in enumerate(io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8")):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number + 1}: {error}") from error


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    """The field by name, or by a path such as `choices.text`."""
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
    """Every string within a value, and where it stands. Half a surrogate pair, which is no text, becomes "?"."""
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
