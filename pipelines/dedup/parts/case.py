"""What the scan is given, from the ranges' files, and what it decides, in a file for each shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from moray.pipelines.dedup.keep_order import KeepOrder
from moray.pipelines.dedup.parts.decide import REASONS, PieceVerdicts, RepeatedPieces
from moray.pipelines.dedup.parts.tasks import SPOT, Folders
from moray.pipelines.shared.arrays import Indices
from moray.pipelines.shared.documents import write_parquet
from moray.pipelines.shared.grouped_file import read_columns
from moray.pipelines.shared.shards import Row


@dataclass(frozen=True)
class ScanCase:
    """pieces: all that is repeated; rows: of each document that has any, in keep order, its row among all documents."""

    order: KeepOrder
    pieces: RepeatedPieces
    rows: Indices

    @staticmethod
    def of(folders: Folders, ranges: int, order: KeepOrder) -> ScanCase:
        found, groups = [read_columns(folders.range("repeated", number), 0) for number in range(ranges)], 0
        for one in found:
            names: Indices = one["group"].astype(np.int64)
            one["group"] = names + groups
            groups += int(names.max(initial=-1)) + 1
        joined = {name: np.concatenate([one[name] for one in found]) for name in (*SPOT, "file", "group")}
        places = order.places[order.firsts[joined["file"]] + joined["row"]]
        ascending = np.argsort(places << 31 | joined["begin"])  # a document has fewer than 2^31 characters
        places = places[ascending]
        documents, first = np.unique(places, return_index=True)
        bounds = np.append(first, len(places)).astype(np.int64)
        columns = [joined[name][ascending] for name in ("begin", "end", "first_word", "end_word", "group")]
        return ScanCase(order, RepeatedPieces(bounds, *columns), order.order[documents])

    def write(self, shards: Sequence[Row], folders: Folders, found: PieceVerdicts) -> None:
        """For each shard: of documents that lose anything what becomes of them, and what is cut of those that stay."""
        files = np.searchsorted(self.order.firsts, self.rows, side="right") - 1
        of_piece = np.repeat(np.arange(len(self.rows)), np.diff(self.pieces.bounds))
        reasons = np.array(["", "", *REASONS.values()])[found.verdicts]
        cut = np.flatnonzero(found.cut & (reasons[of_piece] == ""))
        owners, begins, ends = of_piece[cut], self.pieces.begins[cut], self.pieces.ends[cut]
        opens = np.ones(len(cut), np.bool_)
        opens[1:] = (owners[1:] != owners[:-1]) | (begins[1:] > ends[:-1])
        closes = np.append(opens[1:], True)[: len(cut)]
        spans = np.stack((owners[opens], begins[opens], ends[closes]), axis=1)
        spans = spans[np.lexsort((spans[:, 1], self.rows[spans[:, 0]]))]
        changed = np.flatnonzero(found.verdicts > 0)
        changed = changed[np.argsort(self.rows[changed])]
        ids, every = self.order.table["id"].combine_chunks(), np.arange(1, len(shards))
        mine_of = np.split(spans, np.searchsorted(files[spans[:, 0]], every))
        here_of = np.split(changed, np.searchsorted(files[changed], every))
        for file, (shard, mine, here) in enumerate(zip(shards, mine_of, here_of, strict=True)):
            at = {"row": self.rows[mine[:, 0]] - self.order.firsts[file], "begin": mine[:, 1], "end": mine[:, 2]}
            write_parquet(folders.of("cuts", shard), pa.table(at))
            table = {
                "row": self.rows[here] - self.order.firsts[file],
                "id": ids.take(pa.array(self.rows[here])),
                "reason": pa.array(reasons[here].tolist(), pa.string()),
                "characters": self.order.documents.lengths[self.order.places[self.rows[here]]],
                "cut": found.lost[here],
                "parts": found.spans[here],
                "partner": ids.take(pa.array(self.rows[found.partners[here]])),
            }
            write_parquet(folders.of("verdicts", shard), pa.table(table))
