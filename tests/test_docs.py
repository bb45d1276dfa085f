"""The documentation's code runs, its links lead somewhere, and its tables name what exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
import yaml

from moray.pipelines.shared.documents import SCHEMA, write_shard
from moray.platform.core.cluster import Cluster
from moray.platform.core.home import Home
from moray.platform.plan.context import StepContext
from moray.platform.plan.recipe import StepSpec
from moray.platform.plan.step import Step, resolve_step
from moray.platform.store.artifacts import Artifact
from tests import shell_blocks
from tests.checkout import ROOT
from tests.shell_blocks import NOT_RUN, bash_blocks, reader_home, run_page, without_comment
from tests.step_contexts import context_for, manifest_of

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_code_font_exist(page: Path) -> None:
    for name in re.findall(
        r"`((?:platform|models|kernels|actors|pipelines|cluster|tests|docs)/[\w./-]+)`", page.read_text()
    ):
        assert (ROOT / name).exists() or name.endswith("/__init__.py"), name


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", page.read_text()))
    assert targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"make {target}: {done.stderr}"


def test_the_example_step_runs(home: Home, tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "add-a-step.md", "python")
    module = ModuleType("count_words")
    exec(compile(code, "docs/add-a-step.md", "exec"), module.__dict__)
    step: Step[Any] = module.__dict__["step"]
    row = ["i", "a bb ccc", "s", "", [("path", "k")]]
    columns = [pa.array([value], field.type) for value, field in zip(row, SCHEMA, strict=True)]
    write_shard(tmp_path / "in" / "documents-00000.parquet", pa.table(columns, schema=SCHEMA))
    manifest = manifest_of("filter", "f")
    context: StepContext[Any] = context_for(
        "words",
        step.Config(min_length=2),
        {"documents": Artifact(tmp_path / "in", manifest)},
        tmp_path / "out",
        home,
        tmp_path / "run",
        Unused(),
    )
    context.folder.mkdir()
    step.run(context)
    assert (tmp_path / "out" / "words.json").read_text() == '{\n  "s": 2\n}\n'
    (snippet,) = blocks(ROOT / "docs" / "add-a-step.md", "yaml")
    spec = StepSpec.model_validate(yaml.safe_load(snippet)["words"])
    assert spec.uses == step.name
    assert set(spec.inputs) == set(step.inputs)
    step.Config.model_validate(spec.with_)


def run_blocks(page: Path, folder: Path) -> str:
    """All Python blocks of a page as one program, in a folder and a home of its own; returns what it printed."""
    program = "\n".join(blocks(page, "python"))
    environment = {**os.environ, "MORAY_HOME": str(folder / "home")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_runs(tmp_path: Path) -> None:
    assert run_blocks(ROOT / "README.md", tmp_path).splitlines()[0] == "corpus run never run"


@pytest.mark.docs
def test_the_page_on_python_runs(tmp_path: Path) -> None:
    printed = run_blocks(ROOT / "docs" / "api.md", tmp_path)
    assert "step 12: loss" in printed
    assert "torch.Size([1, 3, 512])" in printed
    assert "hint: did you mean 'steps'?" in printed


def test_the_page_on_models_runs(tmp_path: Path) -> None:
    run_blocks(ROOT / "docs" / "models.md", tmp_path)
    assert (tmp_path / "tiny-fp8" / "config.json").exists()


def test_the_recipes_on_models_are_valid() -> None:
    for snippet in blocks(ROOT / "docs" / "models.md", "yaml"):
        steps = yaml.safe_load(snippet)
        for key, fields in steps.get("steps", steps).items():
            spec = StepSpec.model_validate(fields)
            step = resolve_step(spec.uses or key)
            assert set(spec.inputs) <= set(step.inputs)
            given = {"steps": 1, **spec.with_} if key == "pretrain" else spec.with_
            step.check(step.Config.model_validate(given), spec.inputs)


SHELL_PAGES = [page for page in PAGES if bash_blocks(page)]


@pytest.mark.docs
@pytest.mark.parametrize("page", SHELL_PAGES, ids=lambda page: page.name)
def test_the_shell_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """What `make quickstart` made is there, in a home that the blocks may change."""
    home = reader_home(Home.from_environment(), tmp_path / "home")
    environment = {**os.environ, "MORAY_HOME": str(home.root), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment.pop("TRITON_INTERPRET", None)
    run_page(page, environment, ROOT)


def test_blocks_that_are_not_run_exist_and_have_a_reason() -> None:
    lines = {without_comment(line) for page in PAGES for block in bash_blocks(page) for line in block.splitlines()}
    assert set(NOT_RUN) <= lines
    assert all(NOT_RUN.values())


def test_a_page_runs_in_order_and_a_command_that_lasts_is_asked_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shell_blocks.LASTING, "python3 -c", ("^ready", 1))  # Python's own status of a Ctrl-C
    monkeypatch.setitem(NOT_RUN, "false", "would fail")
    page = tmp_path / "page.md"
    server = "print('ready', flush=True); open('asked', 'x').close(); import time; time.sleep(600)"
    page.write_text(
        "```bash\ntouch one      # a file\nfalse            # left out\n```\n"
        f'```bash\npython3 -c "{server}"\n```\n```bash\nuntil test -e asked; do :; done\n```\n'
        "```bash\ntouch last\n```\n```text\nexit 1\n```\n"
    )
    with pytest.raises(AssertionError, match="python3 -c"):  # killed by the signal: not the status that is expected
        run_page(page, os.environ, tmp_path)
    monkeypatch.setitem(shell_blocks.LASTING, "python3 -c", ("^ready", -2))
    (tmp_path / "asked").unlink()
    run_page(page, os.environ, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"page.md", "one", "asked", "last"}
    page.write_text("```bash\necho words; exit 3\n```\n")
    with pytest.raises(AssertionError, match=r"exit 3\n.*\nwords"):
        run_page(page, os.environ, tmp_path)


class Unused(Cluster):
    """The example step needs no Ray; asking for it is a failure."""

    def ensure(self) -> Any:
        raise AssertionError

    topology = ensure

    def stop(self) -> None:
        raise AssertionError
