"""The source hash of a step changes with its imports, and with nothing else."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from moray.platform.plan import code_hash
from moray.platform.plan.step import Step, resolve_step


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A step of another distribution that leans on one of our rooms."""
    (tmp_path / "elsewhere.py").write_text(
        "from typing import ClassVar\n"
        "from moray.platform.plan.step import Step, StepConfig\n"
        "class Nothing(Step[StepConfig]):\n"
        "    name: ClassVar[str] = 'nothing'\n"
        "    Config = StepConfig\n"
        "    produces: ClassVar[str] = 'nothing'\n"
        "    def run(self, ctx):\n"
        "        from moray.pipelines.shared.documents import read_shard\n"
        "step = Nothing()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("elsewhere", None)


def forget() -> None:
    code_hash._file.cache_clear()
    code_hash.imports_of.cache_clear()


def load() -> Step[Any]:
    return importlib.import_module("elsewhere").step  # type: ignore[no-any-return]


def test_an_edit_changes_the_hash(package: Path) -> None:
    forget()
    before = code_hash.source_hash(load())
    assert before == code_hash.source_hash(load())
    path = package / "elsewhere.py"
    path.write_text(path.read_text() + "# a word more\n")
    forget()
    assert code_hash.source_hash(load()) != before


def test_imports_inside_functions_count(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    documents = code_hash._file("moray.pipelines.shared.documents")
    assert documents is not None
    before = code_hash.source_hash(load())
    copy = package / "documents.py"
    copy.write_text(documents.read_text() + "# a word more\n")
    real = code_hash._file
    monkeypatch.setattr(
        code_hash, "_file", lambda name: copy if name == "moray.pipelines.shared.documents" else real(name)
    )
    assert code_hash.source_hash(load()) != before


def test_every_built_in_step_has_one() -> None:
    forget()
    hashes = {
        name: code_hash.source_hash(resolve_step(name)) for name in ("corpus", "filter", "pretrain", "smoke-serve")
    }
    assert all(len(value) == 16 for value in hashes.values())
    assert len(set(hashes.values())) == len(hashes)
