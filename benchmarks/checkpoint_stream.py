"""Conversion of a checkpoint in bounded memory: a synthetic BF16 checkpoint of V3's widths to FP8 and back.

RLIMIT_DATA limits the private memory of the converting process, libraries included, to the size of the largest tensor
plus one shard. Any allocation above that limit fails. Usage: python benchmarks/checkpoint_stream.py [GIGABYTES]
[FOLDER]
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness.result import Bar, report

from moray.models.checkpoint import PRECISIONS, convert
from moray.models.config import ModelConfig
from moray.models.presets import PRESETS, parameter_count
from moray.models.safetensors_folder import DTYPES, SHARD_BYTES, FolderWriter
from moray.models.tensors import parameter_shapes, stored_tensors


def config_of(gigabytes: float) -> ModelConfig:
    """V3's widths, one dense layer, and one MoE layer with enough experts to reach the size."""
    sizes = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    config = dataclasses.replace(PRESETS["v3"], **sizes)
    for groups_of in range(2, 33):
        config = dataclasses.replace(config, n_routed_experts=8 * groups_of)
        if parameter_count(config).total * 2 >= gigabytes * 1e9:
            break
    return config


def synthesize(folder: Path, config: ModelConfig) -> None:
    """Writes random weights. Each tensor repeats a few million numbers, because only its size matters here."""
    pool = torch.randn(1 << 22) * 0.006
    layout = stored_tensors(config, "bf16")
    with FolderWriter(folder, layout) as writer:
        for name, (dtype, shape) in layout.items():
            size = torch.Size(shape).numel()
            numbers = pool.to(DTYPES[dtype]).repeat(-(-size // len(pool)))[:size]
            writer.write(name, numbers.view(shape))
        writer.finish(config.to_hf(PRECISIONS["bf16"]))


def limited(source: Path, target: Path, precision: str, limit: int, answer: Any) -> None:
    """Converts under the memory limit and puts the seconds into `answer`."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(2)
    began = time.perf_counter()
    convert(source, target, precision)
    answer.put(time.perf_counter() - began)


def main(gigabytes: str = "20", folder: str | None = None) -> int:
    spawn = multiprocessing.get_context("spawn")
    at = Path(folder or tempfile.mkdtemp())
    config = config_of(float(gigabytes))
    largest = max(2 * torch.Size(shape).numel() for shape in parameter_shapes(config).values())
    limit = largest + SHARD_BYTES
    rows: list[dict[str, Any]] = []
    try:
        synthesize(at / "bf16", config)
        for source, target in (("bf16", "fp8"), ("fp8", "bf16")):
            answer = spawn.SimpleQueue()
            child = spawn.Process(target=limited, args=(at / source, at / f"{target}.new", target, limit, answer))
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(f"{source} to {target}: died under {limit / 1e9:.2f} GB, exit {child.exitcode}")
            seconds = answer.get()
            shutil.rmtree(at / source)
            (at / f"{target}.new").rename(at / target)
            size = sum(path.stat().st_size for path in (at / target).iterdir())
            figures = {"wrote_GB": size / 1e9, "seconds": seconds, "limit_GB": limit / 1e9}
            rows.append({"from": source, "to": target, **figures})
    finally:
        if folder is None:
            shutil.rmtree(at)
    stored = parameter_count(config).total * 2 / 1e9
    bars = [Bar("checkpoint, times the memory allowed", stored * 1e9 / limit, 5.0, "higher")]
    return report("checkpoint_stream", [*rows, {"checkpoint_GB": stored, "largest_tensor_GB": largest / 1e9}], bars)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
