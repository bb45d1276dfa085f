"""The error of AdamW's second moments in FP8 against FP32, by beta2.

Rounding to the nearest FP8 number loses any change smaller than half a unit in the last place. Each step moves a moment
by 1 - beta2 of its distance from the squared gradient. So the closer beta2 is to 1, the more moments stop changing.
Gradients are random, with a scale per parameter. Halfway through the run, the gradients of every other parameter are
divided by four, and the moments must follow.

Usage: python benchmarks/fp8_moments.py [parameters=65536] [horizons=8]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from harness.result import Bar, report

from moray.kernels.adamw_fp8 import Fp8Moment, compress_reference, restore_reference
from moray.pipelines.pretrain.validate import MAX_BETA2

BETAS = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)


def followed(beta2: float, count: int, horizons: int) -> dict[str, Any]:
    """Quantiles of the ratio of FP8 to FP32 moments, for parameters whose gradients shrank and for the others.

    The run has `horizons` averaging times of beta2 before the change and `horizons` after it. An averaging time is
    1 / (1 - beta2) steps.
    """
    generator = torch.Generator().manual_seed(1)
    sizes_N = 10.0 ** (2 * torch.rand(count, generator=generator) - 5)
    changed_N = torch.arange(count) % 2 == 0
    exact_N, stored = torch.zeros(count), Fp8Moment.zeros(count)
    steps = round(horizons / (1 - beta2))
    for step in range(2 * steps):
        if step == steps:
            sizes_N = torch.where(changed_N, sizes_N / 4, sizes_N)
        squares_N = (torch.randn(count, generator=generator) * sizes_N) ** 2
        exact_N.lerp_(squares_N, 1 - beta2)
        stored = compress_reference(restore_reference(stored).lerp_(squares_N, 1 - beta2))
    ratio_N = restore_reference(stored) / exact_N
    found: dict[str, Any] = {"beta2": beta2, "steps": 2 * steps}
    for name, part_N in (("smaller", changed_N), ("same", ~changed_N)):
        median, high = ratio_N[part_N].quantile(torch.tensor([0.5, 0.99])).tolist()
        found |= {f"{name}_median": median, f"{name}_99th": high}
    found["error"] = max(abs(found[f"{name}_median"] - 1) for name in ("smaller", "same"))
    return found


def main(parameters: str = "65536", horizons: str = "8") -> int:
    rows = [followed(beta2, int(parameters), int(horizons)) for beta2 in BETAS]
    allowed = max(row["error"] for row in rows if row["beta2"] <= MAX_BETA2)
    bar = Bar(f"median error up to beta2 = {MAX_BETA2}, the largest that Moray accepts", allowed, 0.1, "lower")
    return report("fp8_moments", rows, [bar])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
