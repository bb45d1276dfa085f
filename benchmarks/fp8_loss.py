"""FP8 training compared with BF16: the same model, seed and data, step by step.

Trains one small model four times, in one process, on the tokens of a pretrained model's lineage (by default the
quickstart's):

    bf16               activations and GEMMs in BF16, moments in FP32: the baseline
    bf16, perturbed    the same, from weights multiplied by 1 + 1e-7: the noise floor
    fp8                linear layers and AdamW's moments in FP8, the rest in BF16
    naive moments      a negative control: fp8, but moments in E4M3 with one scale per tensor

and compares the losses of the last 100 steps. Usage: python benchmarks/fp8_loss.py [STEPS] [MODEL]
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness.result import Bar, report
from torch import Tensor

from moray.actors.data.batch_plan import BatchPlan
from moray.actors.data.data_worker import DataWorker
from moray.kernels.adamw_fp8 import Fp8Moment, restore
from moray.kernels.util.host_memory import keep_freed_memory
from moray.models.config import ModelConfig
from moray.models.flops import token_flops
from moray.models.presets import preset
from moray.models.tensors import is_quantized, parameter_shapes
from moray.pipelines.pretrain.config import PretrainConfig, TrainingJob
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.optim import adamw
from moray.pipelines.pretrain.train_step import train_step
from moray.pipelines.pretrain.worker import Worker, build
from moray.platform.core.home import Home
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.search import find_artifact

TAIL = 100
NAIVE = "naive moments"
BATCH = 4
# Dense layers sum over 2048 elements, and the vocabulary is small compared with the layers.
SIZES = {
    "hidden_size": 256, "intermediate_size": 2048, "moe_intermediate_size": 128, "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
}  # fmt: skip


def fp8_share(config: ModelConfig, length: int) -> float:
    """FP8 linear layers' share of the operations of all matrix products."""
    flops = token_flops(config, length)
    idle = config.n_routed_experts - config.num_experts_per_tok
    shapes = {name: shape for name, shape in parameter_shapes(config).items() if is_quantized(name)}
    total = sum(2 * rows * columns for rows, columns in shapes.values())
    total -= len(config.moe_layers) * idle * 6 * config.hidden_size * config.moe_intermediate_size
    return total / flops.forward


def worker_of(model: ModelConfig, length: int, steps: int, form: str) -> Worker:
    moments = "fp8" if form == "fp8" else "float32"
    fields = {"steps": steps, "batch_sequences": BATCH, "precision": form, "optimizer": {"moments": moments}, "seed": 3}
    fields["schedule"] = {"peak": 1e-3, "final": 1e-4, "warmup_tokens": 20 * BATCH * length}
    job = TrainingJob(PretrainConfig.model_validate(fields), model, length, "unused", "unused", "pretrain", threads=2)
    return build(job, Mesh.alone(), torch.device("cpu"))


def train(name: str, worker: Worker, data: DataWorker, steps: int) -> np.ndarray[Any, Any]:
    losses, began = [], time.monotonic()
    for step in range(steps):
        figures, _ = train_step(worker, data.batch(step, 0, BATCH).unpacked(), step)
        losses.append(figures["train_loss"])
        if step % 50 == 49:
            pace = (time.monotonic() - began) / (step + 1)
            print(f"  {name}: step {step + 1}, loss {losses[-1]:.4f}, {pace:.2f} s a step", file=sys.stderr, flush=True)
    return np.array(losses)


def perturb(worker: Worker) -> None:
    with torch.no_grad():
        for parameter in worker.model.parameters():
            parameter.mul_(1 + 1e-7 * torch.sign(torch.rand_like(parameter) - 0.5))


@torch.no_grad()
def naive_adamw(
    master: Tensor,
    grad: Tensor,
    first: Fp8Moment,
    second: Fp8Moment,
    *,
    step: int,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """AdamW's step, but each moment is stored in E4M3 with one scale per tensor, from its largest value."""
    m = restore(first).lerp_(grad, 1 - beta1)
    v = restore(second).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    divisor = (v / (1 - beta2**step)).sqrt_().add_(epsilon)
    master.mul_(1 - rate * weight_decay).addcdiv_(m, divisor, value=-rate / (1 - beta1**step))
    for moment, fresh in ((first, m), (second, v)):
        largest = fresh.abs().max().clamp(min=1e-30)
        moment.fp8_N.copy_((fresh / largest * 448).to(torch.float8_e4m3fn))
        moment.scales_J.fill_(largest)


def main(steps: str = "600", model: str = "quickstart@newest") -> int:
    torch.set_num_threads(2)
    keep_freed_memory()
    store = ArtifactStore(Home.from_environment())
    trained = find_artifact(store, find_artifact(store, model).manifest.inputs["checkpoint"])
    tokens = store.fetch(find_artifact(store, trained.manifest.inputs["tokens"])).folder / "train"
    data = DataWorker(str(tokens), {}, 3, BatchPlan.constant(BATCH))
    first = next(iter(data._sets.values()))
    length, count = first.sequence_length, int(steps)
    config = dataclasses.replace(preset("tiny"), vocab_size=first.vocabulary.size, **SIZES)

    def run(name: str, form: str, prepare: Callable[[Worker], None] | None = None) -> np.ndarray[Any, Any]:
        worker = worker_of(config, length, count, form)
        if prepare:
            prepare(worker)
        return train(name, worker, data, count)

    curves = {
        "bf16": run("bf16", "bf16"),
        "bf16, perturbed": run("bf16, perturbed", "bf16", perturb),
        "fp8": run("fp8", "fp8"),
    }
    adamw.adamw_fp8 = naive_adamw  # type: ignore[attr-defined]
    try:
        curves[NAIVE] = run(NAIVE, "fp8")
    except FloatingPointError as error:
        print(f"  {NAIVE}: {error}", file=sys.stderr)
        curves[NAIVE] = np.full(count, np.inf)
    exact = curves["bf16"][-TAIL:]
    rows: list[dict[str, Any]] = []
    for name, curve in curves.items():
        off = curve[-TAIL:] / exact - 1
        error, worst = float(np.abs(off.mean()) * 100), float(np.abs(off).max() * 100)
        rows.append({"run": name, "loss": float(curve[-TAIL:].mean()), "off_%": error, "worst_step_%": worst})
    share = fp8_share(config, length)
    widest = max(shape[1] for name, shape in parameter_shapes(config).items() if is_quantized(name))
    control = rows[3]["off_%"] / max(rows[1]["off_%"], rows[2]["off_%"])
    bars = [
        Bar("relative loss error of fp8, mean of the last 100 steps, %", rows[2]["off_%"], 0.25, "lower"),
        Bar("share of matrix operations in FP8", share, 0.7, "higher"),
        Bar("largest K of a linear layer in FP8", float(widest), 2048, "higher"),
        Bar("naive moments: error over the larger of fp8 and noise", control, 100.0, "higher"),
    ]
    return report("fp8_loss", rows, bars)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
