"""The memory of one rank in the training steps of four recipes: the real model, optimizer and step on the meta device.

`moray plan RECIPE --memory` prints the same. Numbers are bytes at the moment of the largest sum.

Usage: python benchmarks/memory_plans.py
"""

from __future__ import annotations

import sys
import time
from typing import Any

from harness.result import Bar, report

from moray.pipelines.pretrain.memory.gpus import usable_bytes
from moray.pipelines.pretrain.memory.measure import step_memory
from moray.pipelines.pretrain.memory.planned_job import planned_job
from moray.platform.api import open_recipe

RECIPES = {"quickstart": "h100-80gb", "moe-1b": "h100-80gb", "moe-16b": "h100-80gb", "v3-671b": "h800-80gb"}
PARTS = (
    "weights", "gathered weights", "quantized weights", "gradients", "masters and moments", "activations", "head",
    "communication", "reduction", "batch", "optimizer step",
)  # fmt: skip
HOST = ("moving average", "checkpoint copy", "offloaded activations")


def main() -> int:
    rows: list[dict[str, Any]] = []
    for name, gpu in RECIPES.items():
        recipe = open_recipe(name)
        for planned in recipe.steps:
            if planned.step.name != "pretrain":
                continue
            job, began = planned_job(recipe, planned), time.perf_counter()
            ranks = job.config.parallel.workers
            found = step_memory(job, ranks)
            seconds = time.perf_counter() - began
            row: dict[str, Any] = {"plan": f"{name} {planned.key}", "ranks": ranks, "gpu": gpu}
            row |= {part.replace(" ", "_"): found.device.at_peak.get(part, 0) for part in PARTS}
            row |= {part.replace(" ", "_"): found.host.largest.get(part, 0) for part in HOST}
            row |= {"sum": found.device.peak, "usable": usable_bytes(gpu), "host": found.host.peak}
            rows.append(row | {"missing": max(0, found.device.peak - usable_bytes(gpu)), "planned_in_s": seconds})
    at = {row["plan"]: row for row in rows}
    bars = [
        Bar(f"{plan}: GB a rank", at[plan]["sum"] / 1e9, 70, "lower")
        for plan in ("moe-1b pretrain", "moe-16b pretrain", "v3-671b pretrain", "v3-671b extend-32k")
    ]
    bars.append(Bar("slowest plan, s", max(row["planned_in_s"] for row in rows), 60, "lower"))
    return report("memory_plans", rows, bars)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
