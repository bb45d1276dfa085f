"""A training step of the toy model on CPU cores: Moray compared with transformers' DeepseekV3, in FP32 and in BF16.

Both start from the same weights, see the same tokens and take AdamW's fused step on FP32 weights. In BF16, transformers
runs under autocast and Moray with `precision: bf16`. transformers runs each of its implementations of experts, with the
default allocator and with the setting of Moray's workers (`kernels/util/host_memory.py`: freed memory is kept). The
fastest of these counts. Each contestant runs in a separate process, as a trainer does. Their steps are interleaved, and
a value is the median of the rounds.

Usage: python benchmarks/train_step_cpu.py [ROUNDS]
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from harness.result import Bar, report
from torch import Tensor, nn

import moray.models
from moray.kernels.util.host_memory import keep_freed_memory
from moray.models.model import DeepseekV3
from moray.models.presets import preset

THREADS, BATCH, LENGTH, WARM_UP = 2, 8, 512, 3
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
KEPT = " with freed memory kept"
PEERS = {f"transformers {name}{kept}": name for name in IMPLEMENTATIONS for kept in ("", KEPT)}
CONTESTANTS = ("moray", *PEERS)
CONFIG = dataclasses.replace(preset("tiny"), vocab_size=8192)


def tokens(step: int) -> Tensor:
    """Token ids [BATCH, LENGTH + 1] with structure, so that routers do not see noise."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, CONFIG.vocab_size, (BATCH, 1), generator=generator)
    stride = torch.randint(1, 9, (BATCH, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH + 1)) % CONFIG.vocab_size


def stepper(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Callable[[int], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(number: int) -> float:
        loss = loss_of(tokens(number))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def ours(folder: Path, dtype: torch.dtype) -> Callable[[int], float]:
    model = moray.models.load(folder)  # type: ignore[attr-defined]
    model.train()
    model.compute_in(dtype)

    def loss_of(ids: Tensor) -> Tensor:
        terms = model.training_loss(ids[:, :-1], ids[:, 1:])
        return terms.main / terms.count

    return stepper(model, loss_of)


def theirs(folder: Path, dtype: torch.dtype, experts: str) -> Callable[[int], float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.set_experts_implementation(experts)
    model.train()
    context = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)

    def loss_of(ids: Tensor) -> Tensor:
        with context:
            loss: Tensor = model(input_ids=ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
        return loss

    return stepper(model, loss_of)


def contestant(link: Connection, who: str, folder: Path, dtype: torch.dtype) -> None:
    """Process that takes a step for every number received, and sends back its seconds and loss. None ends it."""
    torch.set_num_threads(THREADS)
    if who == "moray" or who.endswith(KEPT):
        keep_freed_memory()
    step = ours(folder, dtype) if who == "moray" else theirs(folder, dtype, PEERS[who])
    for number in iter(link.recv, None):
        began = time.perf_counter()
        loss = step(number)
        link.send((time.perf_counter() - began, loss))


def race(folder: Path, dtype: torch.dtype, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens per second and last loss, by contestant."""
    spawn = multiprocessing.get_context("spawn")
    links, processes = {}, []
    for who in CONTESTANTS:
        links[who], theirs_end = spawn.Pipe()
        processes.append(spawn.Process(target=contestant, args=(theirs_end, who, folder, dtype)))
        processes[-1].start()
        theirs_end.close()
    seconds: dict[str, list[float]] = {who: [] for who in CONTESTANTS}
    losses: dict[str, float] = {}
    for number in range(WARM_UP + rounds):
        for who, link in links.items():
            link.send(number)
            took, losses[who] = link.recv()
            if number >= WARM_UP:
                seconds[who].append(took)
    for link in links.values():
        link.send(None)
    for process in processes:
        process.join()
    return {who: BATCH * LENGTH / statistics.median(times) for who, times in seconds.items()}, losses


def main(rounds: str = "9") -> int:
    rows: list[dict[str, Any]] = []
    bars = []
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path) / "model"
        model = DeepseekV3(CONFIG)
        model.init_weights(seed=1)
        moray.models.save(model, folder, "float32")  # type: ignore[attr-defined]
        for dtype in (torch.float32, torch.bfloat16):
            pace, losses = race(folder, dtype, int(rounds))
            kind = str(dtype).removeprefix("torch.")
            rows += [{"dtype": kind, "who": who, "tokens_s": pace[who], "last_loss": losses[who]} for who in pace]
            peer = max(pace[who] for who in PEERS)
            bars.append(Bar(f"{kind}: tokens/s over the fastest transformers", pace["moray"] / peer, 1.3, "higher"))
    return report("train_step_cpu", rows, bars)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
