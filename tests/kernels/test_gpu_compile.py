"""Every Triton kernel compiles for a Hopper GPU, within its limits, on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT
from tests.kernels.gpu_compiler import specimens

SHARED_LIMIT = 227 * 1024  # bytes of a block on an H100
# A kernel that multiplies FP8 numbers on tensor cores does so with these, or it does not at all.
FP8_PRODUCT = ".f32.e4m3.e4m3"


@pytest.mark.heavy
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    script = Path(__file__).with_name("gpu_compiler.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["specimen"] for row in rows} == set(specimens())
    print_changes(rows)
    for row in rows:
        assert not row["serialized"], f"{row['specimen']}: the assembler serializes products: {row}"
        assert row["stack"] == 0, f"{row['specimen']} spills registers: {row}"
        assert row["shared"] <= SHARED_LIMIT, row
        if "fp8 product" in row["specimen"]:
            assert any(FP8_PRODUCT in name for name in row["instructions"]), row


def print_changes(rows):
    """What differs from the last measured commit (`benchmarks/kernel_resources.py`)."""
    result = json.loads((ROOT / "benchmarks" / "results" / "kernel_resources.json").read_text())
    before = {row["kernel"]: row for row in result["rows"]}
    print(f"against {result['measured']['commit'][:12]}:")
    for row in rows:
        now = {"registers": row["registers"], "shared_KiB": row["shared"] / 1024, "instructions": row["machine"]}
        old = before.get(row["specimen"], {})
        changes = [f"{name} {old.get(name)} -> {value}" for name, value in now.items() if old.get(name) != value]
        print(f"{row['specimen']}: {', '.join(changes) or 'the same'}")
