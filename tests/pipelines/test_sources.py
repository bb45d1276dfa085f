"""Kernels are kept under a checksum of all the files that are compiled into them."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from moray.pipelines.text.sources import sources

ROOT = Path(__file__).resolve().parents[2]


def compiled_into(module: str) -> set[str]:
    """The module, and those that it imports and they import, which hold functions for numba or constants of theirs."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py")
        if name in found or not path.is_file():
            continue
        found.add(name)
        nodes = ast.walk(ast.parse(path.read_text()))
        waiting += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return found


@pytest.mark.parametrize("module", ["moray.pipelines.filter.kernel", "moray.pipelines.quality.features"])
def test_a_kernel_names_all_that_it_is_made_of(module: str) -> None:
    named = set(importlib.import_module(module).FILES)
    assert compiled_into(module) - {"moray.pipelines.text.sources"} == named


def test_a_changed_file_changes_the_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("one_kernel", "another_kernel"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('nobody imports this')\n")
    before = sources("one_kernel", "another_kernel")
    assert sources("one_kernel", "another_kernel") == before
    (tmp_path / "another_kernel.py").write_text("x = 1\n")
    assert sources("one_kernel", "another_kernel") != before
    with pytest.raises(ModuleNotFoundError):
        sources("no_such_kernel")
