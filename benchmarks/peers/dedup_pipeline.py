"""datatrove's fuzzy dedup, Parquet to Parquet, with its local executor, two workers and words split at white space.

Usage: python dedup_pipeline.py FOLDER OUT; prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger

SIZE, BANDS, ROWS = 5, 14, 8
TASKS = 8  # files are distributed over the tasks, and two tasks run at a time


class Spaces(WordTokenizer):
    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


def main(source: str, out: str) -> None:
    logger.remove()
    config = MinhashConfig(SIZE, BANDS, ROWS, hash_config=HashConfig(32, "xxhash"))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        at = Path(name)
        signature = MinhashDedupSignature(str(at / "signatures"), config, language=Spaces())  # type: ignore[arg-type]
        stages = (
            (TASKS, [ParquetReader(source, glob_pattern="*.parquet"), signature]),
            (BANDS, [MinhashDedupBuckets(str(at / "signatures"), str(at / "buckets"), config=config)]),
            (1, [MinhashDedupCluster(str(at / "buckets"), str(at / "removed"), config)]),
            (
                TASKS,
                [
                    ParquetReader(source, glob_pattern="*.parquet"),
                    MinhashDedupFilter(str(at / "removed")),
                    ParquetWriter(out),
                ],
            ),
        )
        for number, (tasks, steps) in enumerate(stages):
            LocalPipelineExecutor(steps, tasks=tasks, workers=2, logging_dir=str(at / f"logs-{number}")).run()
        removed = sum(path.stat().st_size // 4 for path in (at / "removed").glob("*.remove"))
    print(json.dumps({"wall_s": time.monotonic() - began, "removed": removed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
