"""dedup-parts: what occurs again elsewhere is cut: lines or paragraphs, or repeats of at least so many words.

A part stays at its first place in keep order and is cut from the others. What counts as the same, by `unit`: lines and
paragraphs whose words are, whatever case and white space (xxh3, 128 bits); or, for `substring`, any run of `tokens`
words, wherever it begins. Phases, each as Ray Data tasks that leave files: shards give keys and places; ranges of keys
say which are repeated (for `substring` twice: fingerprints first, then windows near those that are shared); one scan
decides; shards are written again. Keys are exchanged as files, so no text is ever moved.

`edited-NNNNN.parquet` says what documents lost, `removed-NNNNN.parquet` which went because too little was left.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from moray.pipelines.dedup.keep_order import KeepOrder
from moray.pipelines.dedup.parts.key_ranges import exchange_ranges
from moray.pipelines.dedup.parts.scan import EDITED, REASONS, PieceVerdicts, scan_pieces
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
from moray.pipelines.dedup.removal import preferring_shards, read_outputs
from moray.pipelines.shared.shards import Row, file_bytes, map_shards
from moray.pipelines.shared.task_records import forget_records
from moray.platform.core.errors import InputError
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step

_LEFTOVERS = (".described", ".fingerprints", ".shared", ".keys", ".repeated", ".cuts", ".verdicts")
_FINGERPRINTS_A_BYTE = 1 / 60  # of text: a word of six bytes and more, and a sixteenth of them
_PARTS_A_BYTE = 1 / 80
_WINDOWS_A_FINGERPRINT = 16


class DedupPartsConfig(StepConfig):
    unit: Literal["line", "paragraph", "substring"] = "paragraph"
    min_characters: int = Field(80, gt=0, description="line, paragraph: shorter ones are never cut")
    tokens: int = Field(50, gt=1, description="substring: words that a repeat has at least")
    copies: int = Field(1, gt=0, description="how many of each part stay")
    max_loss: float = Field(0.8, gt=0, le=1, description="a document that loses a larger share of its characters goes")
    min_words: int = Field(20, ge=0, description="a document that was cut and has fewer words left goes")
    prefer: tuple[str, ...] = Field((), description="sources whose documents stay whole first, best first")

    @model_validator(mode="after")
    def _of_the_unit(self) -> DedupPartsConfig:
        other = "min_characters" if self.unit == "substring" else "tokens"
        if getattr(self, other) != type(self).model_fields[other].default:
            raise ValueError(f"`{other}` means nothing for `unit: {self.unit}`")
        return self


class DedupParts(Step[DedupPartsConfig]):
    name: ClassVar[str] = "dedup-parts"
    version: ClassVar[int] = 2  # 2: words and parts in every form of Unicode
    Config = DedupPartsConfig
    inputs: ClassVar[dict[str, str]] = {"documents": "documents"}
    produces: ClassVar[str] = "documents"
    resumable: ClassVar[bool] = True
    needs_ray: ClassVar[bool] = True

    def run(self, ctx: StepContext[DedupPartsConfig]) -> None:
        shards, folders = preferring_shards(ctx), Folders(ctx.folder)
        ranges = self._keys(ctx, shards, folders)
        every: list[Row] = [{"shard": number} for number in range(ranges)]
        match = partial(match_pieces, folders=folders, shards=shards)
        map_shards(ctx, "comparing", every, match, "ranges", lambda row: 1)
        verdicts = self._decide(ctx, shards, folders, ranges)
        rows = map_shards(ctx, "cutting", shards, partial(cut_shard, folders=folders), "bytes", file_bytes)
        reasons = {why: sum(row.get(f"dropped:{why}", 0) for row in rows) for why in REASONS.values()}
        kept, edited = sum(row["kept"] for row in rows), int((verdicts.verdicts == EDITED).sum())
        if not kept:
            raise InputError("dedup-parts removes every document", f"by reason: {reasons}")
        for name in _LEFTOVERS:
            shutil.rmtree(ctx.folder / name, ignore_errors=True)
        forget_records(ctx.folder)
        ctx.counts |= {
            "in:documents": kept + sum(reasons.values()),
            "out:documents": kept,
            "bytes": sum(row["bytes"] for row in rows),
            "edited": edited,
            "parts": int(verdicts.spans.sum()),
            "cut:characters": int(verdicts.lost.sum()),
            **{f"dropped:{why}": count for why, count in reasons.items() if count},
        }
        ctx.outcome = f"cut {verdicts.lost.sum() / 1e6:.1f} M characters; removed {sum(reasons.values())} documents"

    def _keys(self, ctx: StepContext[DedupPartsConfig], shards: list[Row], folders: Folders) -> int:
        """Leaves the keys of all pieces; in how many ranges."""
        config, size = ctx.config, sum(text_size(Path(shard["path"])) for shard in shards)
        if config.unit != "substring":
            ranges = exchange_ranges(size * _PARTS_A_BYTE)
            part = partial(part_shard, folders=folders, unit=config.unit, least=config.min_characters, ranges=ranges)
            map_shards(ctx, "reading", shards, part, "bytes", file_bytes)
            return ranges
        shared = exchange_ranges(size * _FINGERPRINTS_A_BYTE)
        read = partial(fingerprint_shard, folders=folders, tokens=config.tokens, ranges=shared)
        map_shards(ctx, "reading", shards, read, "bytes", file_bytes)
        match = partial(match_fingerprints, folders=folders, shards=shards)
        every: list[Row] = [{"shard": number} for number in range(shared)]
        rows = map_shards(ctx, "matching", every, match, "ranges", lambda row: 1)
        ranges = exchange_ranges(sum(row["rows"] for row in rows) * _WINDOWS_A_FINGERPRINT)
        read = partial(window_shard, folders=folders, tokens=config.tokens, shared=shared, ranges=ranges)
        map_shards(ctx, "reading again", shards, read, "bytes", file_bytes)
        return ranges

    def _decide(
        self, ctx: StepContext[DedupPartsConfig], shards: list[Row], folders: Folders, ranges: int
    ) -> PieceVerdicts:
        order = KeepOrder.of(read_outputs(ctx.folder / ".described", shards), ctx.config.prefer)
        scan, config = read_scan_input(folders, ranges, order), ctx.config
        found = scan_pieces(scan.pieces, scan.length_D, scan.words_D, config.copies, config.max_loss, config.min_words)
        write_scan_output(shards, folders, order, scan, found)
        return found


step = DedupParts()
