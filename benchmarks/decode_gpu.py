"""The engine's forward on one GPU (`EagerModel`): decode steps and prompts, with random weights of `small`'s sizes.

The correctness check comes first: a tiny model writes 64 ids after each of eight prompts of different lengths, by
chunks over the paged cache on the GPU in FP32, and each id must be the likeliest after a whole forward on the CPU, or
within 1e-3 of it. Then BF16 weights: the median time of a step at several batch sizes after 1,024 positions, and of a
prompt. The limit of a decode step is the time to read its weights once, at the rate of a large copy; a batch uses
E (1 - (1 - K / E)^n) experts of a layer on average. A server on GPUs (Ray Serve) is not part of this.

Usage: PYTHONPATH=. python benchmarks/decode_gpu.py
Needs torch and Triton; not Ray. `--small` only checks, on the CPU with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from typing import Any

import torch
from harness.result import Bar, report
from kernels_gpu import Clock, ceilings, has_gpu

from moray.models.cache import LatentCache
from moray.models.config import ModelConfig
from moray.models.eager import EagerModel
from moray.models.model import DeepseekV3
from moray.models.presets import preset
from moray.models.rows import Span

BLOCK = 64
CONTEXT = 1024
BATCHES = (1, 8, 64)
STEPS, WARM_UP = 30, 10
NEAR = 1e-3


class Sequences:
    """Sequences that take steps together, each with a block table of its own."""

    def __init__(self, model: EagerModel, prompts: list[list[int]], room: int) -> None:
        self.model, self.ids, self.done = model, [list(prompt) for prompt in prompts], [0] * len(prompts)
        blocks = -(-room // BLOCK)
        self.cache: LatentCache = model.cache(blocks * len(prompts), BLOCK)
        self.tables = [range(number * blocks, (number + 1) * blocks) for number in range(len(prompts))]

    def step(self, chunk: int = 1 << 30) -> None:
        """Runs the next ids of every sequence, at most `chunk`, and appends the likeliest id to those that are read."""
        spans = [
            Span(ids[done : done + chunk], done, table, 1)
            for ids, done, table in zip(self.ids, self.done, self.tables, strict=True)
        ]
        best = self.model.forward(spans, self.cache).best
        for number, span in enumerate(spans):
            self.done[number] += len(span.ids)
            if self.done[number] == len(self.ids[number]):
                self.ids[number].append(best[number])


def check(device: str) -> float:
    """The largest logit minus that of the id that was written, at its largest."""
    config = dataclasses.replace(preset("tiny"), initializer_range=0.1)
    model = DeepseekV3(config).eval()
    model.init_weights(seed=3)
    reference = DeepseekV3(config).eval()
    reference.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, config.vocab_size, (5 + 23 * n,), generator=generator).tolist() for n in range(8)]
    sequences = Sequences(EagerModel(model.to(device)), prompts, 320)
    while min(map(len, sequences.ids)) < min(map(len, prompts)) + 64:
        sequences.step(chunk=50)
    worst = 0.0
    with torch.inference_mode():
        for prompt, ids in zip(prompts, sequences.ids, strict=True):
            logits = reference(torch.tensor([ids[:-1]])).logits[0, len(prompt) - 1 :]
            chosen = logits.gather(1, torch.tensor(ids[len(prompt) :]).unsqueeze(1))[:, 0]
            worst = max(worst, (logits.max(-1).values - chosen).max().item())
    return worst


def active_bytes(model: DeepseekV3, batch: int) -> float:
    """Bytes of weights that a decode step of `batch` tokens reads, each once."""
    config = model.config
    share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    total = 0.0
    for name, view, _ in model.logical_parameters():
        if "embed_tokens" not in name:
            total += view.numel() * view.element_size() * (share if ".experts." in name else 1)
    return total


def rows(config: ModelConfig, copy_bytes_s: float) -> list[dict[str, Any]]:
    with torch.device("cuda"):
        model = DeepseekV3(config).to(torch.bfloat16).eval()
    model.init_weights(seed=1)
    eager = EagerModel(model)
    found = []
    for batch in BATCHES:
        prompts = torch.randint(0, config.vocab_size, (batch, CONTEXT)).tolist()
        Sequences(eager, prompts, CONTEXT + BLOCK).step()  # compiles what it needs
        sequences = Sequences(eager, prompts, CONTEXT + 2 * (STEPS + WARM_UP))
        times = []
        for _ in range(1 + WARM_UP + STEPS):
            torch.cuda.synchronize()
            began = time.perf_counter()
            sequences.step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        step = statistics.median(times[1 + WARM_UP :])
        limit = active_bytes(model, batch) / copy_bytes_s
        row = {"batch": batch, "step_ms": 1e3 * step, "tokens_s": batch / step, "share_of_limit": limit / step}
        found.append(row | {"prompt_tokens_s": batch * CONTEXT / times[0]})
        print(found[-1], flush=True)
    return found


def main() -> int:
    if "--small" in sys.argv:
        worst = check("cpu")
        print(f"the chosen ids are within {worst:.1e} of the likeliest")
        return int(worst > NEAR)
    if not has_gpu("TRITON_INTERPRET=1 python benchmarks/decode_gpu.py --small checks the forward"):
        return 2
    worst = check("cuda")
    copy = ceilings(Clock())["copy_TB_s"] * 1e12
    measured = rows(preset("small"), copy)
    bars = [Bar("logit of the chosen ids below the largest, FP32", worst, NEAR, "lower")]
    return report("decode_gpu", [{"copy_bytes_s": copy}, *measured], bars)


if __name__ == "__main__":
    sys.exit(main())
