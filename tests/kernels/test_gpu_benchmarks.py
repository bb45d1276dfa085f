"""The benchmarks for GPUs are ready to run: their cases agree with the references, without a GPU, Ray or DeepSpeed."""

import os
import subprocess
import sys

import pytest

from tests.checkout import ROOT

BENCHMARKS = ROOT / "benchmarks"
PRELUDE = "import runpy, sys; sys.modules.update(ray=None, deepspeed=None, mlflow=None); del sys.argv[0]; "


def _python(code, *arguments, **environment):
    path = os.pathsep.join((str(BENCHMARKS.parent), str(BENCHMARKS)))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("script", "agreed"),
    [
        ("kernels_gpu.py", "agrees with its reference: "),
        pytest.param("tune_gpu.py", "shapes agree: ", marks=pytest.mark.evidence),
    ],
)
def test_every_case_agrees_with_its_reference(script, agreed):
    run = PRELUDE + "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = _python(run, str(BENCHMARKS / script), "--small", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert sum(line.startswith(agreed) for line in done.stdout.splitlines()) >= 12


ONE_AFTER_ANOTHER = """
for script in list(sys.argv):
    sys.argv = [script]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        print(script, ended.code)
"""


@pytest.mark.heavy
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU here")
def test_without_a_gpu_they_report_an_error():
    hints = {
        "kernels_gpu.py": "hint: TRITON_INTERPRET=1",
        "tune_gpu.py": "hint: TRITON_INTERPRET=1",
        "train_step_gpu.py": "hint: python benchmarks/train_step_cpu.py",
    }
    scripts = [str(BENCHMARKS / name) for name in hints]
    done = _python(PRELUDE + ONE_AFTER_ANOTHER, *scripts)
    assert done.stdout.splitlines() == [f"{script} 2" for script in scripts], done.stderr
    lines = done.stderr.splitlines()
    assert lines[::2] == ["error: no GPU here, so nothing was measured"] * 3
    assert all(line.startswith(hint) for line, hint in zip(lines[1::2], hints.values(), strict=True))
