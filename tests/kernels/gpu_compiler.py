"""Compiles the Triton kernels for a GPU without one: `python tests/kernels/gpu_compiler.py [NAME ...]`.

Triton includes NVIDIA's assembler, so everything except the launch runs on any machine. The test files' `SPECIMENS`
call kernels' public functions with small tensors that have the properties of real models' tensors: sizes are divisible
by 16, rows are aligned. Instead of launching a kernel, this compiles it, with the specializations (alignment,
constants, tensor descriptors) that follow from the call. Prints one JSON line per compiled kernel: registers, bytes of
stack that a thread spills to, bytes of shared memory, the number of machine instructions, the tensor-core instructions,
and the assembler's warnings that it serializes asynchronous products (C75xx), which makes them slow.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Absent:
    """Answers Triton's queries to a driver before compilation, for a GPU that is absent."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack, shared memory and machine instructions as reported by NVIDIA's tools."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _said("cuobjdump", "--dump-resource-usage", file.name)
        code = _said("nvdisasm", "--print-code", file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}
    machine = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP)", code, re.MULTILINE))
    return {"registers": found["REG"], "stack": found["STACK"], "shared": found["SHARED"], "machine": machine}


def _said(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], check=True, capture_output=True, text=True).stdout


def compile_instead_of_launching() -> list[Any]:
    """Makes launches compile only; returns the list that collects the compiled kernels."""
    compiled: list[Any] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    JITFunction.run = run  # type: ignore[method-assign]
    driver.set_active(Absent())
    return compiled


def specimens() -> dict[str, Callable[[], object]]:
    """Those of all test files of this folder."""
    found: dict[str, Callable[[], object]] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        found |= getattr(importlib.import_module(f"tests.kernels.{path.stem}"), "SPECIMENS", {})
    return found


def main(names: list[str]) -> None:
    compiled = compile_instead_of_launching()
    triton.knobs.nvidia.dump_ptxas_log = True  # printed by each compilation
    for name, call in specimens().items():
        if names and name not in names:
            continue
        compiled.clear()
        with contextlib.redirect_stdout(io.StringIO()) as log:
            call()
        serialized = sorted(set(re.findall(r"C75\d\d", log.getvalue())))
        for kernel in dict.fromkeys(compiled):
            instructions = Counter(
                re.findall(r"wgmma\.mma_async\.sync\.aligned[\w.]*|cp\.async\.bulk", kernel.asm["ptx"])
            )
            row = {"specimen": name, "kernel": kernel.name, **usage(kernel.asm["cubin"])}
            row["shared"] = max(row["shared"], kernel.metadata.shared)
            row |= {"warps": kernel.metadata.num_warps, "instructions": instructions, "serialized": serialized}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
