"""Divides the files of a source into tasks of about as many ids, of whole documents.

A large file is several segments: documents of a Megatron file, or row groups of a Parquet file. An Arrow stream can
only be read from its beginning, so it is one segment. Consecutive small segments are one task. Only headers and footers
are read here, and the tasks depend on nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from moray.pipelines.corpus.source_file import File
from moray.pipelines.shared.shards import Row
from moray.pipelines.tokenize.pretokenized.id_tables import (
    check_arrow,
    read_arrow_ids,
    read_row_groups,
    row_group_tokens,
)
from moray.pipelines.tokenize.pretokenized.megatron import open_megatron
from moray.pipelines.tokenize.pretokenized.source import PretokenizedSource
from moray.pipelines.tokenize.pretokenized.stored_ids import StoredIds
from moray.platform.core.errors import InputError

_ARROW_ID_BYTES = 4  # of an id in an Arrow file, to estimate their number


@dataclass(frozen=True)
class Segment:
    """Units [first, last) of a file: documents of a Megatron file, row groups of a Parquet file, or all (0, 1).

    key: the file's name within its source. index: the other file of a Megatron pair. tokens: about how many ids.
    """

    key: str
    file: File
    index: File | None
    column: str
    first: int
    last: int
    tokens: int

    def read(self) -> Iterator[StoredIds]:
        """Raises InputError for damage."""
        if self.index is not None:
            yield from open_megatron(self.index, self.file).read(self.first, self.last)
        elif self.file.suffixes[-1] == ".parquet":
            yield from read_row_groups(self.file, self.column, self.first, self.last)
        else:
            yield from read_arrow_ids(self.file, self.column)


@dataclass(frozen=True)
class _Candidate:
    """A file, or a pair of files, that is not divided yet."""

    key: str
    file: File
    index: File | None
    column: str

    def segment(self, first: int, last: int, tokens: int) -> Segment:
        return Segment(self.key, self.file, self.index, self.column, first, last, tokens)


def source_candidates(source: PretokenizedSource) -> list[_Candidate]:
    """The files of a source. Raises InputError if there are none."""
    if source.format == "megatron":
        found = [_Candidate(key, data, index, source.column) for key, index, data in source.pairs()]
    else:
        found = [_Candidate(key, file, None, source.column) for key, file in source.files()]
    if not found:
        kind = "pair PREFIX.idx and PREFIX.bin" if source.format == "megatron" else ".parquet or .arrow file"
        split = f" of the split {source.split!r}" if source.format == "huggingface" else ""
        raise InputError(
            f"source {source.name!r}: no {kind}{split} matches {list(source.include)} in {source.location()}",
            "correct `include`, `split` or the location",
        )
    return found


def file_segments(candidate: _Candidate, group_tokens: int) -> list[Segment]:
    """The segments of a file, of about `group_tokens` ids or one unit each. Raises InputError for a bad header."""
    if candidate.index is not None:
        files = open_megatron(candidate.index, candidate.file)
        count = min(files.documents, -(-files.tokens // group_tokens))
        cuts = [files.documents * n // count for n in range(count + 1)] if count else []
        return [candidate.segment(first, last, files.tokens // count) for first, last in pairwise(cuts)]
    if candidate.file.suffixes[-1] != ".parquet":
        check_arrow(candidate.file, candidate.column)
        return [candidate.segment(0, 1, candidate.file.size // _ARROW_ID_BYTES)]
    segments: list[Segment] = []
    first = tokens = 0
    row_groups = row_group_tokens(candidate.file, candidate.column)
    for number, found in enumerate(row_groups, 1):
        tokens += found
        if tokens >= group_tokens or number == len(row_groups):
            segments.append(candidate.segment(first, number, tokens))
            first, tokens = number, 0
    return segments


def segment_tasks(source: int, segments: Iterable[Segment], group_tokens: int) -> Iterator[Row]:
    """Tasks of consecutive segments. A task ends once it has at least `group_tokens` ids. source: its number."""
    kept: list[Segment] = []
    number = tokens = 0
    for segment in segments:
        kept.append(segment)
        tokens += segment.tokens
        if tokens >= group_tokens:
            yield _task(source, number, kept)
            kept, number, tokens = [], number + 1, 0
    if kept:
        yield _task(source, number, kept)


def _task(source: int, number: int, segments: list[Segment]) -> Row:
    # As JSON, because names of files need not be UTF-8.
    text = json.dumps([asdict(segment) for segment in segments])
    return {
        "source": source,
        "number": number,
        "segments": text,
        "tokens": sum(segment.tokens for segment in segments),
    }


def task_segments(task: Row) -> list[Segment]:
    """The segments of a task."""

    def file(found: Any) -> File | None:
        return File(**found) if found else None

    return [
        Segment(**{**found, "file": File(**found["file"]), "index": file(found["index"])})
        for found in json.loads(task["segments"])
    ]
