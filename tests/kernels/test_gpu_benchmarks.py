"""The benchmarks for GPUs are ready to run: their cases agree with the references, without a GPU, Ray or DeepSpeed."""

import os
import subprocess
import sys

import pytest
import yaml

from moray.pipelines.pretrain.config import ModelSection, model_config
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


RUN = PRELUDE + "runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("script", "agreed"),
    [
        ("kernels_gpu.py", "agrees with its reference: "),
        pytest.param("tune_gpu.py", "shapes agree: ", marks=pytest.mark.evidence),
    ],
)
def test_every_case_agrees_with_its_reference(script, agreed):
    done = _python(RUN, str(BENCHMARKS / script), "--small", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
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
        "lease.py": "hint: TRITON_INTERPRET=1",
    }
    scripts = [str(BENCHMARKS / name) for name in hints]
    done = _python(PRELUDE + ONE_AFTER_ANOTHER, *scripts)
    assert done.stdout.splitlines() == [f"{script} 2" for script in scripts], done.stderr
    lines = done.stderr.splitlines()
    assert lines[::2] == ["error: no GPU here, so nothing was measured"] * 4
    assert all(line.startswith(hint) for line, hint in zip(lines[1::2], hints.values(), strict=True))


BARE = ("ray", "deepspeed", "mlflow", "pydantic", "pyarrow", "psutil", "boto3", "numba", "yaml", "transformers")


@pytest.mark.heavy
def test_every_part_of_a_lease_runs_without_a_gpu_and_other_packages_than_torch(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({BARE}))\n")
    path = os.pathsep.join((str(tmp_path), str(ROOT), str(BENCHMARKS)))
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = _python(RUN, str(BENCHMARKS / "lease.py"), "--dry-run", **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    ended = [line for line in lines if line.startswith("part ") and "  ended " in line]
    assert len(ended) == 7
    assert all(line.endswith("  ended done") for line in ended)
    assert not [line for line in lines if line.startswith("fails: ")]


def test_a_lease_trains_the_model_of_the_recipe():
    code = "from harness.lease_parts import moe_1b; print(moe_1b())"
    done = _python(code)
    recipe = yaml.safe_load((ROOT / "recipes" / "moe-1b.yaml").read_text())["steps"]
    section = ModelSection(**recipe["pretrain"]["with"]["model"])
    vocabulary = recipe["tokenizer"]["with"]["vocab_size"]
    assert done.stdout.strip() == str(model_config(section, vocabulary)), done.stderr


def test_a_lease_names_its_parts():
    done = _python(RUN, str(BENCHMARKS / "lease.py"), "decoding")
    assert done.returncode == 2
    assert "unknown part 'decoding'; the parts are one rank, bf16" in done.stderr
