"""Everything that a short time on one GPU should settle, in one command: correctness first, then times.

Each part of `harness/lease_parts.py` runs in a process of its own, with a limit. After each, the result is saved. A
part that fails or exceeds its limit does not stop the others, and a part that no longer fits into the budget is
skipped. The expected memory comes from the same code on the meta device.

Usage: PYTHONPATH=. python benchmarks/lease.py [--minutes 12] [--out FOLDER] [PART ...]
       TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/lease.py --dry-run     without a GPU: each part at small sizes
Needs torch and triton; not Ray, DeepSpeed, or the packages of a training worker.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import result
from harness.lease_parts import PARTS, Scale
from harness.result import Bar, report
from kernels_gpu import has_gpu

_SAVING = 5.0  # seconds kept for the last result
_MEASURES = ("moray.kernels.fp8_experts", "moray.kernels.mla_decode", "moray.models.model")


def run_part(name: str, seconds: float, dry: bool) -> tuple[list[dict[str, Any]], list[Bar]]:
    """Rows and bars of one part, which has at most `seconds`. A failure is a row and a bar that fails."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--run", name, "--found", str(found), *(["--dry-run"] if dry else [])]
        environment = os.environ | ({"MORAY_KERNELS": "triton"} if dry else {})
        try:
            code = subprocess.run(command, timeout=seconds, check=False, env=environment).returncode
            why = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            why = f"not done after {seconds:.0f} s"
        # A part writes what it has after each measurement, so a part that was stopped has a result too.
        content = json.loads(found.read_text()) if found.exists() else {"rows": [], "bars": []}
    rows = [{"part": name, **row} for row in content["rows"]]
    bars = [Bar(**bar) for bar in content["bars"]]
    rows.append({"part": name, "seconds": time.monotonic() - began, "ended": why or "done"})
    return rows, bars + ([Bar(f"{name}: {why}", 1, 0, "lower")] if why else [])


def child(name: str, found: Path, dry: bool) -> int:
    """Runs a part in this process and writes its rows and bars."""
    scale = Scale.dry() if dry else Scale.gpu()
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    torch.manual_seed(0)
    for row, goals in PARTS[name].run(scale):
        rows.append(row)
        bars += goals
        print({"part": name, **row}, file=sys.stderr, flush=True)
        part = {"rows": rows, "bars": [vars(bar) for bar in bars]}
        temporary = found.with_suffix(".new")
        temporary.write_text(json.dumps(part))
        temporary.replace(found)
    return 0


def main(arguments: argparse.Namespace) -> int:
    dry = arguments.dry_run
    if not dry and not has_gpu("TRITON_INTERPRET=1 python benchmarks/lease.py --dry-run checks every part"):
        return 2
    if arguments.out or dry:
        result.RESULTS = Path(arguments.out or tempfile.mkdtemp())
    device = "dry-run" if dry else torch.cuda.get_device_name().replace(" ", "-")
    ends = time.monotonic() + arguments.minutes * 60 - _SAVING
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    for name in arguments.parts or PARTS:
        left = ends - time.monotonic()
        if left < PARTS[name].least and not dry:
            rows.append({"part": name, "ended": f"skipped: {left:.0f} s are left, it needs {PARTS[name].least:.0f}"})
        else:
            part_rows, part_bars = run_part(name, min(left, PARTS[name].most), dry)
            rows += part_rows
            bars += part_bars
        result.write(f"lease-{device}", rows, bars, _MEASURES)
    return report(f"lease-{device}", rows, bars, _MEASURES)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--out", help="folder of the result (default: benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    found = parser.parse_args()
    if unknown := [name for name in found.parts if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    return found


if __name__ == "__main__":
    options = _arguments()
    sys.exit(child(options.run, options.found, options.dry_run) if options.run else main(options))
