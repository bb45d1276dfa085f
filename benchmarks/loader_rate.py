"""Tokens per second that data workers serve to 2,048 ranks, on the cores of this machine.

Two data workers, Ray actors, serve the batches of DeepSeek-V3's training: 15,360 sequences of 4,096 tokens of 4 bytes,
so 7 or 8 sequences for each rank. Requests are those of the training loop (`Loaders`), for all ranks, with the next
step's requested in advance. V3 trained 3.2 million tokens a second (14.8 T tokens in 2.664 M hours of 2,048 GPUs). The
tokens are 0.5 GB of random ids in 64 files, which the system has in memory. The process that plays all ranks uses the
same cores as the workers; in training the ranks have their own.

Separately, on one core and without Ray: choosing the sequences, reading them, and what each rank does with a batch that
has arrived.

Usage: python benchmarks/loader_rate.py [STEPS=3]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from harness.result import Bar, report

from moray.actors.data.batch_plan import BatchPlan
from moray.actors.data.data_worker import DataWorker, start_data_workers
from moray.actors.data.token_set import TokenVocabulary, write_index, write_token_shard
from moray.pipelines.pretrain.loop import Loaders

RANKS, WORKERS = 2048, 2
BATCH, LENGTH, VOCABULARY = 15_360, 4096, 129_280
SHARDS, SEQUENCES = 64, 512
NEEDED = 14.8e12 / (2.664e6 / 2048 * 3600)  # DeepSeek-V3, arXiv 2412.19437, table 1


def write_tokens(folder: Path) -> None:
    vocabulary = TokenVocabulary("random", VOCABULARY, bos=0, eos=1, pad=2)
    generator = np.random.default_rng(1)
    shards = []
    for number in range(SHARDS):
        ids = generator.integers(3, VOCABULARY, (SEQUENCES, LENGTH), dtype=np.uint32)
        pieces = pa.table({"id": ["d"], "part": [0], "start": [0], "tokens": [ids.size], "bytes": [4 * ids.size]})
        shards.append(write_token_shard(folder, number, ids, pieces))
    write_index(folder, shards, LENGTH, vocabulary)


def slots(rank: int) -> tuple[int, int]:
    return BATCH * rank // RANKS, BATCH * (rank + 1) // RANKS


def served(folder: Path, steps: int) -> float:
    """Tokens per second through Ray."""
    import ray

    ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, object_store_memory=2 << 30)
    workers = start_data_workers(WORKERS, str(folder), {}, 1, BatchPlan.constant(BATCH))
    ranks = [Loaders(workers, rank, RANKS) for rank in range(RANKS)]

    def request(step: int) -> list[Any]:
        return [loaders.request(step, *slots(rank)) for rank, loaders in enumerate(ranks)]

    ray.get(request(0)[:64])  # the workers have started
    began, ahead = time.perf_counter(), request(1)
    for step in range(1, steps + 1):
        handles, ahead = ahead, request(step + 1) if step < steps else []
        for handle in handles:
            ray.get(handle)
    seconds = time.perf_counter() - began
    ray.shutdown()
    return steps * BATCH * LENGTH / seconds


def milliseconds(work: Callable[[int], object]) -> float:
    """Mean over 200 ranks."""
    began = time.perf_counter()
    for rank in range(200):
        work(rank)
    return (time.perf_counter() - began) / 200 * 1e3


def main(steps: str = "3") -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "source")
        worker = DataWorker(str(folder), {}, 1, BatchPlan.constant(BATCH))
        stored = [worker.batch(7, *slots(rank)) for rank in range(200)]
        parts = {
            "choosing the sequences": milliseconds(lambda rank: worker._mixture.batch(7, *slots(rank))),
            "choosing and reading them": milliseconds(lambda rank: worker.batch(7, *slots(rank))),
            "unpacking by the rank": milliseconds(lambda rank: stored[rank].unpacked()),
        }
        rate = served(folder, int(steps))
    sent = stored[0].ids.nbytes / stored[0].ids.size
    rows: list[dict[str, Any]] = [{"work": work, "ms_of_a_request": value} for work, value in parts.items()]
    rows.append({"work": "served through Ray", "tokens_s": rate, "bytes_of_a_token": sent, "data_workers": WORKERS})
    return report("loader_rate", rows, [Bar("tokens/s served to 2,048 ranks", rate, NEEDED, "higher")])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
