"""A training step on one GPU: Moray, in each precision and optimizer, compared with transformers' DeepseekV3.

The correctness checks come first. A tiny model trains for some steps with the Triton kernels and with their references,
in each precision, and the losses are compared. One run is also resumed from a checkpoint halfway. Then a model of
`small`'s widths takes the steps of a job from random weights, on the same tokens for each contestant. Each contestant
runs in a separate process, and only one trains at a time. transformers runs in BF16 under autocast, with grouped
experts, PyTorch's attention and fused AdamW on FP32 weights. All contestants clip the gradient. Step times are medians.

Usage: PYTHONPATH=. python benchmarks/train_step_gpu.py
Needs the packages of a training worker, transformers for the peer, and DeepSpeed for ZeRO; not Ray.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness.plain_training import Reader, losses_of, train_here, write_tokens
from harness.result import Bar, report
from kernels_gpu import has_gpu

from moray.actors.data.token_set import Batch
from moray.models.config import ModelConfig
from moray.models.flops import token_flops
from moray.models.presets import preset
from moray.pipelines.pretrain.config import PretrainConfig, TrainingJob
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.peak_flops import peak_flops
from moray.pipelines.pretrain.train_step import train_step
from moray.pipelines.pretrain.worker import build
from moray.platform.core.ports import free_port

TINY_LENGTH, TINY_STEPS = 256, 40
LENGTH, SEQUENCES, STEPS, WARM_UP = 4096, 8, 16, 6
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bf16": {"precision": "bf16"},
    "fp8": {"precision": "fp8", "optimizer": {"moments": "fp8"}},
}
GENTLE = {"peak": 3e-4}  # low enough for stable training, so that the order of summation changes losses little
ALLOWED = {"float32": 1e-4, "bf16": 5e-3, "fp8": 1e-2}  # largest relative difference of a loss from the reference
WAYS: dict[str, dict[str, Any]] = {
    "moray bf16": {"precision": "bf16"},
    "moray fp8, FP8 moments": {"precision": "fp8", "optimizer": {"moments": "fp8"}},
    "moray bf16, ZeRO 1": {"precision": "bf16", "parallel": {"zero_stage": 1}},
    "moray bf16, ZeRO 2, offloaded": {
        "precision": "bf16",
        "parallel": {"zero_stage": 2},
        "optimizer": {"offload": True},
    },
}
PEER = "transformers bf16"


def wide_model() -> ModelConfig:
    """0.7B parameters."""
    return dataclasses.replace(preset("small"), vocab_size=32768, num_hidden_layers=3, n_routed_experts=24)


def make_job(folder: Path, model: ModelConfig, length: int, steps: int, settings: dict[str, Any]) -> TrainingJob:
    parallel = {"workers": 1, "expert_parallel": 1, **settings.get("parallel", {})}
    fields = {"steps": steps, "batch_sequences": SEQUENCES, **settings, "parallel": parallel}
    config = PretrainConfig.model_validate(fields)
    return TrainingJob(config, model, length, str(folder / "run"), str(folder / "events"), "pretrain", threads=4)


class Run:
    """Training in a separate process."""

    def __init__(self, folder: Path, job: TrainingJob, tokens: Path, kernels: str = "triton") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job").write_bytes(pickle.dumps((job, str(tokens))))
        self.folder, self._log = folder, folder / "log"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--rank", str(folder / "job")],
            env={**os.environ, "MORAY_KERNELS": kernels},
            stdout=self._log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def end(self) -> str | None:
        """Waits for the process; returns None if it succeeded, else the last line of its log."""
        if self._process.wait() == 0:
            return None
        text = self._log.read_text()
        print(f"{self.folder.name} failed:\n{text[-3000:]}", file=sys.stderr, flush=True)
        return text.strip().splitlines()[-1]


def alone() -> torch.device:
    """Makes this process the only rank, on the first GPU."""
    device = torch.device("cuda", 0)
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("nccl", init_method=address, rank=0, world_size=1, device_id=device)
    return device


def rank_main(path: str) -> None:
    job, tokens = pickle.loads(Path(path).read_bytes())  # trusted, written by `Run`
    train_here(job, tokens, alone())


def contestant(link: Connection, who: str, job: TrainingJob, tokens: str) -> None:
    """Process that builds its model, sends "ready", waits for a message, and takes its steps.

    It then sends (seconds per step, peak bytes allocated), or the reason as a string if it fails.
    """
    try:
        device = alone()
        step = peer(job, device) if who == PEER else ours(job, device)
        reader = Reader(job, tokens)
        batches = [reader.receive((number, 0, SEQUENCES)) for number in range(job.config.steps)]
        link.send("ready")
        link.recv()
        times = [_seconds(step, number, batch) for number, batch in enumerate(batches)]
        link.send((times[WARM_UP:], torch.cuda.max_memory_allocated(device)))
    except Exception as error:  # of any kind, so that the other contestants still run
        traceback.print_exc()
        link.send(f"{type(error).__name__}: {error}"[:300])


def _seconds(step: Callable[[int, Batch], None], number: int, batch: Batch) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    step(number, batch)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def ours(job: TrainingJob, device: torch.device) -> Callable[[int, Batch], None]:
    worker = build(job, Mesh.create(1, device), device)

    def step(number: int, batch: Batch) -> None:
        train_step(worker, batch, number)

    return step


def peer(job: TrainingJob, device: torch.device) -> Callable[[int, Batch], None]:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    hf = {name: value for name, value in job.model.to_hf().items() if name not in ("architectures", "dtype")}
    with device:
        model = DeepseekV3ForCausalLM._from_config(DeepseekV3Config(**hf), attn_implementation="sdpa")
    model.set_experts_implementation("grouped_mm")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(number: int, batch: Batch) -> None:
        ids = torch.from_numpy(batch.ids).to(device)
        targets = torch.where(torch.from_numpy(batch.mask).to(device), ids, -100).roll(-1, 1)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, shift_labels=targets.contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def agreement(root: Path) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Compares kernels with references, and a resumed run with an uninterrupted one. The runs are concurrent."""
    tokens = root / "tokens-tiny"
    write_tokens(tokens / "numbers", TINY_LENGTH)
    model = dataclasses.replace(preset("tiny"), hidden_size=256, moe_intermediate_size=128, intermediate_size=512)
    model = dataclasses.replace(model, num_nextn_predict_layers=1)

    def start(name: str, kernels: str = "triton", **settings: Any) -> Run:
        settings |= {"ema_half_life_tokens": 10000, "checkpoint": {"every": TINY_STEPS // 2}, "schedule": GENTLE}
        return Run(root / name, make_job(root / name, model, TINY_LENGTH, TINY_STEPS, settings), tokens, kernels)

    running = {
        f"{name} {kernels}": start(f"{name} {kernels}", kernels, **settings)
        for name, settings in PRECISIONS.items()
        for kernels in ("triton", "reference")
    }
    for stage in (1, 2):
        running[f"ZeRO {stage}"] = start(f"ZeRO {stage}", parallel={"zero_stage": stage})
    running["fp8 again"] = start("fp8 again", **PRECISIONS["fp8"])
    failed = {name: why for name, process in running.items() if (why := process.end())}
    rows: list[dict[str, Any]] = [{"run": name, "failed": why} for name, why in failed.items()]
    bars = [Bar(f"{name}: failed", 1, 0, "lower") for name in failed]
    curves = {name: losses_of(root / name) for name in running if name not in failed}
    for name, curve in curves.items():
        rows.append({"run": name, "first_loss": curve[0], "last_loss": curve[-1], "losses": curve})
    pairs = {name: (f"{name} triton", f"{name} reference") for name in PRECISIONS}
    pairs |= {f"ZeRO {stage}": (f"ZeRO {stage}", "float32 triton") for stage in (1, 2)}
    for name, (one, other) in pairs.items():
        if one in curves and other in curves:
            apart = max(abs(a / b - 1) for a, b in zip(curves[one], curves[other], strict=True))
            bars.append(Bar(f"{one} off {other} at most", apart, ALLOWED.get(name, 1e-4), "lower"))
    if "fp8 again" in curves and "fp8 triton" in curves:
        shutil.rmtree(root / "fp8 again" / "run" / "checkpoints" / f"step-{TINY_STEPS:08d}")
        shutil.rmtree(root / "fp8 again" / "events")
        why = start("fp8 again", **PRECISIONS["fp8"]).end()
        resumed = [] if why else losses_of(root / "fp8 again")
        differ = _differing(curves["fp8 again"], curves["fp8 triton"])
        bars.append(Bar("steps at which two FP8 runs have not the same bits", differ, 0, "lower"))
        differ = _differing(resumed, curves["fp8 triton"][TINY_STEPS // 2 :])
        bars.append(Bar("steps after a checkpoint that have not the same bits", differ, 0, "lower"))
    return rows, bars


def _differing(found: list[float], expected: list[float]) -> int:
    """Number of steps whose losses differ or are missing."""
    return sum(a != b for a, b in itertools.zip_longest(found, expected))


def pace(root: Path) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Measures each contestant's step. All build their models concurrently, but only one trains at a time."""
    tokens = root / "tokens"
    write_tokens(tokens / "numbers", LENGTH, documents=2000)
    model, spawn = wide_model(), multiprocessing.get_context("spawn")
    flops = token_flops(model, LENGTH).training * SEQUENCES * LENGTH
    links: dict[str, Connection] = {}
    processes: dict[str, Any] = {}
    for who, settings in {**WAYS, PEER: {}}.items():
        job = make_job(root / who, model, LENGTH, STEPS, {"document_mask": False, **settings})
        links[who], theirs = spawn.Pipe()
        processes[who] = spawn.Process(target=contestant, args=(theirs, who, job, str(tokens)), daemon=True)
        processes[who].start()
        theirs.close()
    built = {who: _hear(link) for who, link in links.items()}
    rows: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    for who, link in links.items():
        if built[who] == "ready":
            link.send("go")
            built[who] = _hear(link)
        processes[who].join()  # frees its memory for the next
        if isinstance(built[who], str):
            rows.append({"who": who, "failed": built[who]})
            continue
        times, held = built[who]
        seconds[who] = statistics.median(times)
        share = flops / seconds[who] / peak_flops(torch.device("cuda", 0))
        rate = SEQUENCES * LENGTH / seconds[who]
        rows.append({"who": who, "ms": seconds[who] * 1e3, "tokens_s": rate, "mfu": share, "GB": held / 1e9})
        print(rows[-1], file=sys.stderr, flush=True)
    found = [(who, seconds[PEER] / seconds[who]) for who in WAYS if who in seconds and PEER in seconds]
    return rows, [Bar(f"{who} over {PEER}", ratio, 1.5, "higher") for who, ratio in found[:2]]


def _hear(link: Connection) -> Any:
    """The next message of a contestant, or an error text if its process has ended."""
    try:
        return link.recv()
    except EOFError:
        return "ended without a word: killed?"


def main() -> int:
    if not has_gpu("python benchmarks/train_step_cpu.py measures a step on a CPU"):
        return 2
    with tempfile.TemporaryDirectory() as path:
        rows, bars = agreement(Path(path))
        for row in rows:
            print(row, file=sys.stderr, flush=True)
        more_rows, more_bars = pace(Path(path))
    device = torch.cuda.get_device_name().replace(" ", "-")
    return report(f"train_step_gpu-{device}", rows + more_rows, bars + more_bars)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(*sys.argv[2:])
    else:
        sys.exit(main(*sys.argv[1:]))
