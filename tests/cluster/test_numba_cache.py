"""numba's cache folder changes with the source of compiled functions, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from moray.cluster import numba_cache as module
from moray.cluster.numba_cache import compiled_files, numba_cache
from tests.checkout import ROOT


def test_the_hash_covers_files_with_compiled_functions_and_their_imports_only() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in compiled_files().values()}
    decorated = {
        path.relative_to(ROOT).as_posix()
        for room in ("kernels", "models", "actors", "pipelines")
        for path in (ROOT / room).rglob("*.py")
        if "njit" in path.read_text()
    }
    assert decorated <= files
    assert len(files) < len(decorated) + 10
    assert any("characters" in name for name in files - decorated), "a table that compiled functions read"
    assert not [name for name in files if name.endswith(("report.py", "step.py"))]


def test_an_edit_of_such_a_file_gives_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    kernel = tmp_path / "kernel.py"
    kernel.write_text("import numba")
    monkeypatch.setattr(module, "compiled_files", lambda: {"kernel": kernel})
    before = numba_cache(tmp_path / "cache")
    assert numba_cache(tmp_path / "cache") == before
    kernel.write_text("import numba  # edited")
    assert numba_cache(tmp_path / "cache") != before
    assert before.parent == tmp_path / "cache"


def test_a_folder_that_is_given_is_used_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "given"))
    folder = numba_cache(tmp_path / "cache")
    assert folder.parent == tmp_path / "given"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    assert numba_cache(tmp_path / "cache") == folder
