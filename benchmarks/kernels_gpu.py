"""Every Triton kernel on the available GPU: time, share of the measured ceiling, ratio to its peers.

Ceilings are measured first: a copy of 1 GB, and square products in BF16 and FP8. Each case is checked against its
reference on fresh random data before it is timed. A case that fails its check is not timed. A time is the median of
launches with a cold L2 cache.

Usage: PYTHONPATH=. python benchmarks/kernels_gpu.py [NAME PART]
       TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/kernels_gpu.py --small    the checks alone, without a GPU
Needs torch and triton, not Ray.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from harness.gpu_cases import GROUPS, SMALL, V3, Case
from harness.result import Bar, report

ROUNDS, WARM_UP = 20, 3


def has_gpu(instead: str) -> bool:
    """Whether a GPU is available; prints an error with the hint `instead` if not."""
    if not torch.cuda.is_available():
        print("error: no GPU here, so nothing was measured", file=sys.stderr)
        print(f"hint: {instead}", file=sys.stderr)
    return torch.cuda.is_available()


class Clock:
    """Times launches with CUDA events, each after the L2 cache is overwritten."""

    def __init__(self) -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def milliseconds(self, run: Callable[[], Any]) -> float:
        for _ in range(WARM_UP):
            run()
        times = []
        for _ in range(ROUNDS):
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)


def ceilings(clock: Clock) -> dict[str, float]:
    """Copy bandwidth in TB/s, and the speed of cuBLAS on a large square product in TFLOPS."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = clock.milliseconds(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    wide = clock.milliseconds(lambda: a @ a)
    fp8, one = a.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    narrow = clock.milliseconds(lambda: torch._scaled_mm(fp8, fp8.t(), one, one, out_dtype=torch.bfloat16))
    work = 2 * 8192**3 / 1e9
    return {"copy_TB_s": 2 * source.numel() / copy / 1e9, "bf16_TFLOPS": work / wide, "fp8_TFLOPS": work / narrow}


def measure(case: Case, clock: Clock, top: dict[str, float]) -> tuple[dict[str, Any], list[Bar]]:
    try:
        case.check()
    except Exception as error:  # of any kind, so that the other kernels are still measured
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"kernel": case.name, "wrong": why}, [Bar(f"{case.name}: wrong", 1, 0, "lower")]
    ours = clock.milliseconds(case.run)
    row: dict[str, Any] = {"kernel": case.name, "ms": ours}
    found: dict[str, float] = {}
    if case.moved:
        found["TB/s"] = case.moved / ours / 1e9
        found["of copy"] = found["TB/s"] / top["copy_TB_s"]
    if case.work:
        found["TFLOPS"] = case.work / ours / 1e9
        row["of_fp8_ceiling"] = found["TFLOPS"] / top["fp8_TFLOPS"]
    for name, peer in case.peers.items():
        try:
            found[f"over {name}"] = clock.milliseconds(peer) / ours
        except (RuntimeError, NotImplementedError) as error:  # a peer may not support a size, such as a single row
            row[f"over {name}"] = f"refused: {str(error).splitlines()[0][:80]}"
    row |= found
    return row, [Bar(f"{case.name}: {unit}", found[unit], goal, "higher") for unit, goal in case.goals if unit in found]


def check_small() -> int:
    """Runs every case's check at small sizes, in Triton's interpreter."""
    os.environ["MORAY_KERNELS"] = "triton"
    torch.manual_seed(0)
    for group in GROUPS:
        for case in group(SMALL, "cpu"):
            case.check()
            case.run()
            print(f"agrees with its reference: {case.name}", flush=True)
    return 0


def main(*arguments: str) -> int:
    if arguments == ("--small",):
        return check_small()
    if not has_gpu("TRITON_INTERPRET=1 python benchmarks/kernels_gpu.py --small checks every case"):
        return 2
    wanted = arguments[0] if arguments else ""
    clock = Clock()
    top = ceilings(clock)
    rows, bars = [{"kernel": "ceilings", **top}], []
    print(rows[0], flush=True)
    for group in GROUPS:
        for case in group(V3, "cuda"):
            if wanted in case.name:
                row, goals = measure(case, clock, top)
                print(row, file=sys.stderr, flush=True)
                rows.append(row)
                bars += goals
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_name().replace(" ", "-")
    return report(f"kernels_gpu-{device}", rows, bars)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
