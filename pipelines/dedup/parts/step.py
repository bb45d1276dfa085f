"""The step `dedup-parts`: cuts text that is repeated elsewhere: lines, paragraphs, or runs of at least `tokens` words.

A repeated part is kept in the first document in priority order and cut from the others. Lines and paragraphs are equal
if their normalized text is (xxh3, 128 bits); with `unit: substring`, any run of `tokens` words can repeat, at any
position. The phases run as Ray Data tasks that write files. Tasks for shards write keys and positions; tasks for ranges
of keys find the repeated ones (`substring` does this twice: for fingerprints, then for windows near shared
fingerprints); one scan decides; tasks rewrite the shards. Tasks exchange keys through files, never text.

`edited-NNNNN.parquet` lists shortened documents, `removed-NNNNN.parquet` documents of which too little was left.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from moray.pipelines.dedup.parts.key_ranges import exchange_ranges
from moray.pipelines.dedup.parts.scan import EDITED, REASONS, ScanDecisions, scan_pieces
from moray.pipelines.dedup.parts.scan_input import read_scan_input
from moray.pipelines.dedup.parts.scan_output import write_scan_output
from moray.pipelines.dedup.parts.tasks import (
    Folders,
    cut_shard,
    fingerprint_shard,
    match_fingerprints,
    match_pieces,
    part_shard,
    text_size,
    window_shard,
)
from moray.pipelines.dedup.priority_order import PriorityOrder
from moray.pipelines.dedup.removal import preferring_shards, read_outputs
from moray.pipelines.shared.shards import Row, file_bytes, map_shards
from moray.pipelines.shared.task_records import forget_records
from moray.platform.core.errors import InputError
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step
from moray.platform.store.paths import in_threads, remove_folder

_WORK_FOLDERS = (".described", ".fingerprints", ".shared", ".keys", ".repeated", ".cuts", ".decisions")
_FINGERPRINTS_PER_BYTE = 1 / 60  # of text: a word takes six bytes or more, and a sixteenth of words have a fingerprint
_PARTS_PER_BYTE = 1 / 80
_WINDOWS_PER_FINGERPRINT = 16


class DedupPartsConfig(StepConfig):
    unit: Literal["line", "paragraph", "substring"] = "paragraph"
    min_characters: int = Field(80, gt=0, description="line, paragraph: shorter ones are never cut")
    tokens: int = Field(50, gt=1, description="substring: minimum length of a repeat, in words")
    copies: int = Field(1, gt=0, description="copies of each part to keep")
    max_loss: float = Field(0.8, gt=0, le=1, description="remove documents that lose a larger share of characters")
    min_words: int = Field(20, ge=0, description="remove documents that were cut to fewer words")
    prefer: tuple[str, ...] = Field((), description="sources whose text is kept, highest priority first")

    @model_validator(mode="after")
    def _of_the_unit(self) -> DedupPartsConfig:
        other = "min_characters" if self.unit == "substring" else "tokens"
        if getattr(self, other) != type(self).model_fields[other].default:
            raise ValueError(f"`{other}` has no effect with `unit: {self.unit}`")
        return self


class DedupParts(Step[DedupPartsConfig]):
    name: ClassVar[str] = "dedup-parts"
    version: ClassVar[int] = 2  # 2: Unicode normalization
    Config = DedupPartsConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def reads_in_place(self, config: DedupPartsConfig) -> frozenset[str]:
        return frozenset({"documents"})

    def run(self, ctx: StepContext[DedupPartsConfig]) -> None:
        shards, folders = preferring_shards(ctx), Folders(ctx.output)
        ranges = self._keys(ctx, shards, folders)
        every: list[Row] = [{"shard": number} for number in range(ranges)]
        match = partial(match_pieces, folders=folders, shards=shards)
        map_shards(ctx, "comparing", every, match, "ranges", lambda row: 1)
        scanned = self._decide(ctx, shards, folders, ranges)
        rows = map_shards(ctx, "cutting", shards, partial(cut_shard, folders=folders), "bytes", file_bytes)
        reasons = {reason: sum(row.get(f"dropped:{reason}", 0) for row in rows) for reason in REASONS.values()}
        kept, edited = sum(row["kept"] for row in rows), int((scanned.decisions == EDITED).sum())
        if not kept:
            raise InputError(
                "dedup-parts removes every document", f"by reason: {reasons}; raise max_loss or lower min_words"
            )
        for name in _WORK_FOLDERS:
            remove_folder(ctx.output / name)
        forget_records(ctx.output)
        ctx.counts |= {
            "in:documents": kept + sum(reasons.values()),
            "out:documents": kept,
            "bytes": sum(row["bytes"] for row in rows),
            "edited": edited,
            "parts": int(scanned.spans.sum()),
            "cut:characters": int(scanned.lost.sum()),
            **{f"dropped:{reason}": count for reason, count in reasons.items() if count},
        }
        ctx.outcome = f"cut {scanned.lost.sum() / 1e6:.1f} M characters; removed {sum(reasons.values())} documents"

    def _keys(self, ctx: StepContext[DedupPartsConfig], shards: list[Row], folders: Folders) -> int:
        """Writes the keys of all pieces. Returns the number of ranges of keys."""
        config, size = ctx.config, sum(in_threads(text_size, shards))
        if config.unit != "substring":
            ranges = exchange_ranges(size * _PARTS_PER_BYTE)
            part = partial(
                part_shard, folders=folders, unit=config.unit, min_characters=config.min_characters, ranges=ranges
            )
            map_shards(ctx, "reading", shards, part, "bytes", file_bytes)
            return ranges
        shared = exchange_ranges(size * _FINGERPRINTS_PER_BYTE)
        read = partial(fingerprint_shard, folders=folders, tokens=config.tokens, ranges=shared)
        map_shards(ctx, "reading", shards, read, "bytes", file_bytes)
        match = partial(match_fingerprints, folders=folders, shards=shards)
        every: list[Row] = [{"shard": number} for number in range(shared)]
        rows = map_shards(ctx, "matching", every, match, "ranges", lambda row: 1)
        ranges = exchange_ranges(sum(row["rows"] for row in rows) * _WINDOWS_PER_FINGERPRINT)
        read = partial(window_shard, folders=folders, tokens=config.tokens, shared=shared, ranges=ranges)
        map_shards(ctx, "reading again", shards, read, "bytes", file_bytes)
        return ranges

    def _decide(
        self, ctx: StepContext[DedupPartsConfig], shards: list[Row], folders: Folders, ranges: int
    ) -> ScanDecisions:
        order = PriorityOrder.of(read_outputs(ctx.output / ".described", shards), ctx.config.prefer)
        scan, config = read_scan_input(folders, ranges, order), ctx.config
        found = scan_pieces(scan.pieces, scan.length_D, scan.words_D, config.copies, config.max_loss, config.min_words)
        write_scan_output(shards, folders, order, scan, found)
        return found


step = DedupParts()
