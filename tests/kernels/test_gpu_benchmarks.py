"""The benchmarks for GPUs are ready to run: their cases agree with the references, without a GPU, Ray or DeepSpeed."""

import os
import subprocess
import sys

import pytest

from tests.checkout import ROOT

BENCHMARKS = ROOT / "benchmarks"
PRELUDE = "import runpy, sys; sys.modules.update(ray=None, deepspeed=None, mlflow=None); del sys.argv[0]; "


def _run(script, *arguments, **environment):
    path = os.pathsep.join((str(BENCHMARKS.parent), str(BENCHMARKS)))
    command = [sys.executable, "-c", PRELUDE + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    return subprocess.run(
        [*command, BENCHMARKS / script, *arguments], env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("script", "agreed"), [("kernels_gpu.py", "agrees with its reference: "), ("tune_gpu.py", "shapes agree: ")]
)
def test_every_case_agrees_with_its_reference(script, agreed):
    done = _run(script, "--small", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert sum(line.startswith(agreed) for line in done.stdout.splitlines()) >= 12


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("script", "hint"),
    [
        ("kernels_gpu.py", "hint: TRITON_INTERPRET=1"),
        ("tune_gpu.py", "hint: TRITON_INTERPRET=1"),
        ("train_step_gpu.py", "hint: python benchmarks/train_step_cpu.py"),
    ],
)
def test_without_a_gpu_they_say_so(script, hint):
    done = _run(script)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no GPU here")
    assert hint in done.stderr
