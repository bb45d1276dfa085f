"""The Ray tasks of dedup-parts: each function takes a task description, writes a file and returns counts.

A task whose file or record exists returns immediately, so a run that resumes after a kill executes only the missing
tasks. Files are named after the shards. There is one folder per kind: document descriptions, keys, repeated keys,
decisions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from moray.pipelines.dedup.parts.key_ranges import Columns, range_of, read_parts, repeated_keys, write_parts
from moray.pipelines.dedup.parts.text_parts import cut_spans, normalized, parts_of
from moray.pipelines.dedup.priority_order import described, read_documents
from moray.pipelines.shared.documents import read_shard, text_bytes, write_parquet, write_shard
from moray.pipelines.shared.grouped_file import read_columns
from moray.pipelines.shared.shards import Row, output_path, shard_path, shard_stem
from moray.pipelines.shared.task_records import recorded
from moray.pipelines.text.arrow import text_buffers
from moray.pipelines.text.characters import tables
from moray.platform.store.paths import AnyPath, open_ranges

SPOT = ("row", "begin", "end", "first_word", "end_word")  # columns with the position of a piece


@dataclass(frozen=True)
class Folders:
    """Paths of the work files, one folder per kind."""

    root: AnyPath

    def of(self, kind: str, shard: Row) -> AnyPath:
        """The file of a shard."""
        return output_path(self.root / f".{kind}", shard)

    def range(self, kind: str, number: int) -> AnyPath:
        """The file of a range of keys."""
        return self.root / f".{kind}" / f"range-{number:05d}.arrow"


def text_size(shard: Row) -> int:
    """Approximate bytes of the texts of a shard, from its Parquet metadata."""
    with open_ranges(shard_path(shard)) as file:
        metadata = pq.read_metadata(file)
    column = metadata.schema.names.index("text")
    return sum(metadata.row_group(i).column(column).total_uncompressed_size for i in range(metadata.num_row_groups))


def part_shard(shard: Row, folders: Folders, unit: str, min_characters: int, ranges: int) -> Row:
    """Writes the keys of a shard's lines or paragraphs of at least `min_characters`, and document descriptions."""
    from moray.pipelines.dedup.parts.windows import count_words

    path = folders.of("described", shard)
    if not path.exists():
        table = read_documents(shard_path(shard))
        hashes, spots, parts = [], [], []
        for row, text in enumerate(table["text"].to_pylist()):
            for begin, end in parts_of(text, unit):
                parts.append(text[begin:end])
                plain = normalized(parts[-1])
                if len(plain) >= min_characters:
                    hashes.append(xxhash.xxh3_128_digest(plain.encode()))
                    spots.append((row, begin, end, len(parts) - 1))
        words = count_words(*text_buffers(pa.chunked_array([pa.array(parts, pa.large_string())])), *tables())
        spot = np.array(spots, np.int64).reshape(-1, 4)
        before = np.concatenate(([0], np.cumsum(words)))
        halves = np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 2)
        columns = dict(zip(SPOT, (*spot[:, :3].T, before[spot[:, 3]], before[spot[:, 3] + 1]), strict=True))
        keys = {"key": halves[:, 0], "other": halves[:, 1]}
        write_parts(folders.of("keys", shard), {**keys, **columns}, range_of(halves[:, 0], ranges))
        counts = count_words(*text_buffers(table["text"]), *tables())
        write_parquet(path, pa.table({**described(table), "words": counts}))
    return {"shard": shard["shard"]}


def fingerprint_shard(shard: Row, folders: Folders, tokens: int, ranges: int) -> Row:
    """Writes the fingerprints of a shard, and document descriptions."""
    from moray.pipelines.dedup.parts.windows import fingerprints, gram_size

    path = folders.of("described", shard)
    if not path.exists():
        table = read_documents(shard_path(shard))
        offsets, data = text_buffers(table["text"])
        capacity = int(offsets[-1] - offsets[0])
        words = np.zeros(len(table), np.int64)
        keys, rows, places = np.empty(capacity, np.uint64), np.empty(capacity, np.int64), np.empty(capacity, np.int64)
        size = gram_size(tokens)
        count = fingerprints(offsets, data, *tables(), tokens, size, words, keys, rows, places)
        columns = {"key": keys[:count], "row": rows[:count], "place": places[:count]}
        write_parts(folders.of("fingerprints", shard), columns, range_of(keys[:count], ranges))
        write_parquet(path, pa.table({**described(table), "words": words}))
    return {"shard": shard["shard"]}


def match_fingerprints(one: Row, folders: Folders, shards: Sequence[Row]) -> Row:
    """Writes the positions of the repeated fingerprints in one range, grouped by shard."""
    path = folders.range("shared", one["shard"])

    def match() -> Row:
        found = read_parts([folders.of("fingerprints", shard) for shard in shards], one["shard"])
        rows, _ = repeated_keys([found["key"]])
        columns = {"row": found["row"][rows], "place": found["place"][rows]}
        write_parts(path, columns, found["file"][rows])
        return {"shard": one["shard"], "rows": len(rows)}

    return recorded(folders.root, f"shared-{path.stem}", match)


def window_shard(shard: Row, folders: Folders, tokens: int, shared: int, ranges: int) -> Row:
    """Writes the keys of a shard's windows that contain a repeated fingerprint.

    shared: the number of ranges of fingerprints. ranges: the number of ranges of keys.
    """
    path = folders.of("keys", shard)
    if not path.exists():
        found = [read_columns(folders.range("shared", number), shard["shard"]) for number in range(shared)]
        rows, places = (np.concatenate([one[name] for one in found]) for name in ("row", "place"))
        order = np.lexsort((places, rows))
        keys, columns = _windows(shard_path(shard), rows[order], places[order], tokens)
        write_parts(path, columns, range_of(keys, ranges))
    return {"shard": shard["shard"]}


def _windows(path: AnyPath, rows: Any, places: Any, tokens: int) -> tuple[Any, Columns]:
    from moray.pipelines.dedup.parts.windows import gram_size, windows

    distinct, at = np.unique(rows, return_inverse=True)
    texts = read_shard(path, ["text"])["text"].take(pa.array(distinct))
    size = gram_size(tokens)
    capacity = len(rows) * (tokens - size + 1)
    keys, others = np.empty(capacity, np.uint64), np.empty(capacity, np.uint64)
    spots = np.empty((capacity, 5), np.int64)
    count = windows(*text_buffers(texts), *tables(), tokens, size, at, places, keys, others, spots)
    columns: Columns = dict(zip(SPOT, spots[:count].T, strict=True))
    return keys[:count], {"key": keys[:count], "other": others[:count], **columns, "row": distinct[spots[:count, 0]]}


def match_pieces(one: Row, folders: Folders, shards: Sequence[Row]) -> Row:
    """Writes the positions of the repeated pieces in one range, and a group number for each distinct piece."""
    path = folders.range("repeated", one["shard"])
    if not path.exists():
        found = read_parts([folders.of("keys", shard) for shard in shards], one["shard"])
        rows, groups = repeated_keys([found["other"], found["key"]])
        columns = {name: found[name][rows] for name in ("file", *SPOT)}
        write_parts(path, {**columns, "group": groups}, np.zeros(len(rows), np.int64))
    return {"shard": one["shard"]}


def cut_shard(shard: Row, folders: Folders) -> Row:
    """Writes the kept documents of one shard, and the lists of edited and removed documents."""
    return recorded(folders.root, shard_stem(shard), lambda: _cut(shard, folders))


def _cut(shard: Row, folders: Folders) -> Row:
    target = output_path(folders.root, shard)
    edited, removed = (target.with_name(target.name.replace("documents-", kind)) for kind in ("edited-", "removed-"))
    decisions = read_shard(folders.of("decisions", shard))
    table = read_shard(shard_path(shard))
    table = table.append_column("row", pa.array(np.arange(len(table))))
    dropped = decisions.filter(pc.not_equal(decisions["reason"], ""))
    changed = decisions.filter(pc.equal(decisions["reason"], ""))
    texts = table["text"].to_pylist()
    for row, spans in _spans(read_shard(folders.of("cuts", shard))):
        texts[row] = cut_spans(texts[row], spans)
    left = pa.array([len(texts[row]) for row in changed["row"].to_pylist()], pa.int64())
    changed = changed.append_column("characters_after", left)
    table = table.set_column(table.schema.get_field_index("text"), "text", pa.array(texts, pa.large_string()))
    table = table.filter(pc.invert(pc.is_in(table["row"], value_set=dropped["row"].combine_chunks())))
    write_parquet(removed, dropped.drop_columns(["row"]))
    write_parquet(edited, changed.select(["id", "characters", "characters_after", "parts", "partner"]))
    kept = table.drop_columns(["row"])
    write_shard(target, kept)
    reasons = Counter(f"dropped:{reason}" for reason in decisions["reason"].to_pylist() if reason)
    return {"shard": shard["shard"], "kept": len(kept), "bytes": text_bytes(kept["text"]), **reasons}


def _spans(cuts: pa.Table) -> list[tuple[int, list[tuple[int, int]]]]:
    """The spans of each row."""
    rows = zip(*(cuts[name].to_pylist() for name in ("row", "begin", "end")), strict=True)
    return [(row, [(begin, end) for _, begin, end in spans]) for row, spans in groupby(rows, key=lambda cut: cut[0])]
