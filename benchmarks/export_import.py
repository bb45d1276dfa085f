"""Export and import with the tensors of DeepSeek-V3: its layers and experts, at tiny widths.

A checkpoint with the keys of master weights, EMA and moments is exported to the FP8 format, which is then imported,
with every value checked in both. Time and memory are those of many tensors; `checkpoint_stream.py` has those of large
ones. Each job runs in a process of its own. The peer for the checkpoint is `torch.distributed.checkpoint.load`, which
reads the index again for every part that fits into memory: the row gives the time of one reading, and the number of
readings at V3's widths.

Usage: python benchmarks/export_import.py
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness.result import Bar, report
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from moray.models.checkpoint import CheckedFolder, write_folder
from moray.models.presets import PRESETS
from moray.models.tensors import bias_shapes, checkpoint_shapes, parameter_shapes
from moray.pipelines.pretrain.checkpoint.checkpoint_index import merge_listings
from moray.pipelines.pretrain.checkpoint.rank_writer import RankWriter
from moray.pipelines.pretrain.checkpoint.stored_part import StoredPart
from moray.pipelines.pretrain.checkpoint.stored_weights import read_weights

MOMENTS = [f"{moment}_{part}" for moment in ("exp_avg", "exp_avg_sq") for part in ("fp8", "scale", "power")]
WIDTHS = {
    **{
        "vocab_size": 64,
        "hidden_size": 8,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "num_attention_heads": 2,
    },
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4},
}
CONFIG = dataclasses.replace(PRESETS["v3"], **WIDTHS)
SHARD_BYTES = 20_000  # as many shards as V3 has in FP8
READ_BYTES = 1 << 28  # of a checkpoint at once
Row = dict[str, Any]


def write_checkpoint(folder: Path) -> Row:
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(CONFIG).items()}
    keys = {f"{kind}/{name}": size for kind in ("master", "ema", *MOMENTS) for name, size in sizes.items()}
    keys |= {f"buffer/{name}": math.prod(shape) for name, shape in bias_shapes(CONFIG).items()}
    writer = RankWriter(0)
    parts = {key: StoredPart(torch.randn(size), 0, size) for key, size in keys.items()}
    writer.write(parts, FileSystemWriter(folder / "checkpoint", sync_files=False))
    (folder / "checkpoint" / ".metadata").write_bytes(merge_listings([writer.listing]))
    return {"keys": len(keys)}


def read_index(folder: Path) -> Row:
    FileSystemReader(folder / "checkpoint").read_metadata()
    size = (folder / "checkpoint" / ".metadata").stat().st_size
    weights = 4 * sum(math.prod(shape) for shape in parameter_shapes(PRESETS["v3"]).values())
    return {"index_MB": size / 1e6, "readings_at_v3": -(-weights // READ_BYTES)}


def export(folder: Path) -> Row:
    shapes = checkpoint_shapes(CONFIG)
    weights = ((name, tensor.view(shapes[name])) for name, tensor in read_weights(folder / "checkpoint"))
    audit = write_folder(folder / "model", CONFIG, weights, "fp8", SHARD_BYTES)
    return {**dataclasses.asdict(audit), "files": len(list((folder / "model").iterdir()))}


def open_model(folder: Path) -> Row:
    CheckedFolder(folder / "model")
    return {}


def check_model(folder: Path) -> Row:
    checked = CheckedFolder(folder / "model")
    for _ in checked.weights():
        pass
    return dataclasses.asdict(checked.audit)


def measured(job: Callable[[Path], Row], folder: Path, answer: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    row = {"job": job.__name__, **job(folder), "seconds": time.perf_counter() - began}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer.put({**row, "peak_GB": peak / 1e6, "over_imports_GB": (peak - before) / 1e6})


def main() -> int:
    spawn = multiprocessing.get_context("spawn")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for job in (write_checkpoint, read_index, export, open_model, check_model):
            answer = spawn.SimpleQueue()
            child = spawn.Process(target=measured, args=(job, Path(folder), answer))
            child.start()
            rows.append(answer.get())
            child.join()
    _, _, exported, _, checked = rows
    assert exported["tensors"] == checked["tensors"] == 91_991
    bars = [
        Bar("export, s", exported["seconds"], 120.0, "lower"),
        Bar("import, s", checked["seconds"], 120.0, "lower"),
    ]
    return report("export_import", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
