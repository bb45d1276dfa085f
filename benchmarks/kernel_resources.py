"""Registers, shared memory and machine instructions of every Triton kernel, compiled for an H100 (`sm_90`) without one.

Usage: python benchmarks/kernel_resources.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from harness.code_state import ROOT
from harness.result import Bar, report

SHARED_LIMIT = 227 * 1024  # bytes per CTA on an H100
COMPILER = ROOT / "tests" / "kernels" / "gpu_compiler.py"


def main() -> int:
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, COMPILER], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    rows: list[dict[str, Any]] = [
        {
            "kernel": one["specimen"],
            "registers": one["registers"],
            "shared_KiB": one["shared"] / 1024,
            "instructions": one["machine"],
        }
        for one in compiled
    ]
    bars = [
        Bar("registers spilled to memory, bytes, most", max(one["stack"] for one in compiled), 0, "lower"),
        Bar(
            "kernels whose products the assembler serializes",
            sum(bool(one["serialized"]) for one in compiled),
            0,
            "lower",
        ),
        Bar("shared memory, bytes, most", max(one["shared"] for one in compiled), SHARED_LIMIT, "lower"),
    ]
    return report("kernel_resources", rows, bars, ["moray.kernels." + path.stem for path in KERNELS])


KERNELS = sorted((ROOT / "kernels").glob("*.py"))

if __name__ == "__main__":
    sys.exit(main())
