"""The command line: exit codes, `error:` and `hint:` lines, and the contents of stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moray.platform.cli.main import _with_names
from tests.checkout import ROOT
from tests.command_line import run_command


def moray_process(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"MORAY_HOME": str(home), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, str(ROOT / "moray.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_version_and_help(tmp_path: Path) -> None:
    import moray as package

    assert moray_process(tmp_path, "--version").stdout.strip() == package.__version__
    shown = moray_process(tmp_path, "--help")
    assert shown.returncode == 0
    for command in ("run", "plan", "serve"):
        assert command in shown.stdout


def test_completion_is_a_script_that_bash_accepts(tmp_path: Path) -> None:
    script = run_command(tmp_path, "completion", "bash").stdout
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    for command in ("artifacts", "doctor", "plan"):
        assert command in script


def test_doctor_as_json_names_every_check(tmp_path: Path) -> None:
    done = moray_process(tmp_path, "doctor", "--json")
    assert {"python", "memory", "home", "compiler"} <= {row["name"] for row in json.loads(done.stdout)}
    assert done.returncode == 0


def test_plan_as_json_lists_every_step(tmp_path: Path) -> None:
    done = moray_process(tmp_path, "plan", "quickstart", "--json", "--set", "pretrain.steps=50")
    rows = json.loads(done.stdout)
    assert [row["step"] for row in rows][:3] == ["corpus", "filter", "dedup"]
    assert {row["action"] for row in rows} == {"run"}
    assert rows[-1]["step"] == "smoke-serve"
    assert not list(tmp_path.iterdir()), "plan writes nothing"


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["rnu"], "unknown command 'rnu'", "did you mean 'run'?"),
        (["run"], "requires an argument", "--help"),
        (["run", "quickstrat"], "unknown recipe 'quickstrat'", "did you mean 'quickstart'?"),
        (["run", "missing.yaml"], "recipe missing.yaml: No such file or directory", "recipes/"),
        (["plan", "quickstart", "--set", "pretrain.stepz=1"], "unknown field", "did you mean 'steps'?"),
        (["plan", "quickstart", "--set", "pretrain.model.hiden_size=1"], "unknown field", "'hidden_size'"),
        (["plan", "quickstart", "--set", "pretrain.model.n_group=3"], "n_group", ""),
        (["plan", "quickstart", "--set", "pretrain.parallel.workers=3"], "workers", ""),
        (["plan", "quickstart", "--gpu", "h100-80gb"], "are options of --memory", "add --memory"),
        (["plan", "quickstart", "--memory", "--imbalance", "nan"], "at least 1", ""),
        (["plan", "quickstart", "--memory", "--gpu", "h100"], "unknown GPU 'h100'", "h100-80gb"),
        (["plan", "synthesize-demo", "--memory"], "trains no model", "pretrain"),
        (["plan", "v3-671b", "--memory", "--step", "extend-64k"], "has no step 'extend-64k'", "extend-32k"),
        (["plan", "quickstart", "--memory", "--step", "dedup"], "step dedup of quickstart trains no model", "pretrain"),
        (["plan", "quickstart", "--step", "pretrain"], "are options of --memory", "add --memory"),
        (["plan", "quickstart", "--set", "pretrain.workers=2"], "unknown field", "write it as parallel.workers"),
        (["serve", "nothing@newest"], "unknown artifact 'nothing@newest'", ""),
        (["serve", "/tmp"], "/tmp has no config.json", "Hugging Face"),
    ],
)
def test_a_mistake_is_one_error_and_exit_2(tmp_path: Path, arguments: list[str], error: str, hint: str) -> None:
    done = run_command(tmp_path, *arguments)
    assert done.returncode == 2
    assert not done.stdout
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: "), done.stderr
    assert error in lines[0]
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))
    assert hint in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing was started"


def test_an_unwritable_home_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_command(tmp_path / "file" / "home", "plan", "quickstart")
    assert done.returncode == 2
    assert "MORAY_HOME" in done.stderr.splitlines()[0]


def test_the_value_of_name_is_no_option() -> None:
    assert _with_names(["submit", "r", "--name", "--help", "-f"]) == ["submit", "r", "--name=--help", "-f"]
    assert _with_names(["submit", "--name"]) == ["submit", "--name"]


def test_a_removed_current_folder_is_one_error(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; exec {sys.executable} {ROOT / 'moray.py'} plan quickstart"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=False, cwd=gone, env={"MORAY_HOME": str(tmp_path)}
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: the current folder no longer exists"
