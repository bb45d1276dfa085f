"""The build of the compiled step, and its packed matrices. What it computes is tested in `tests/models`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from moray.kernels import cached_step
from moray.kernels.cached_step import BuildError, library, pack, padded


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a compiler of this shell script. The script's first line is for `--version`."""

    def make(script: str) -> None:
        path = tmp_path / "compiler"
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo fake && exit\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CC", str(path))

    return make


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(BuildError, match=r"neither \$CC nor cc, gcc or clang"):
        library(tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path, fake_compiler) -> None:
    fake_compiler("echo 'error: no such instruction' >&2; exit 1")
    with pytest.raises(BuildError, match="no such instruction"):
        library(tmp_path / "native")
    assert not list((tmp_path / "native").iterdir())


def test_a_library_that_does_not_load_is_an_error(tmp_path: Path, fake_compiler) -> None:
    fake_compiler('for last; do :; done; while [ "$1" != -o ]; do shift; done; echo text > "$2"')
    with pytest.raises(BuildError, match="cannot be made or loaded"):
        library(tmp_path / "native")


def test_a_damaged_library_is_built_again(tmp_path: Path) -> None:
    library(tmp_path / "native")
    (made,) = (tmp_path / "native").iterdir()
    cached_step._load.cache_clear()
    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / made.name).write_bytes(made.read_bytes()[:100])
    library(copied)
    assert (copied / made.name).stat().st_size == made.stat().st_size


def test_a_folder_that_cannot_be_written_is_no_library(tmp_path: Path, fake_compiler) -> None:
    (tmp_path / "native").touch()
    with pytest.raises(BuildError, match="cannot be made or loaded"):
        library(tmp_path / "native")
    cached_step._load.cache_clear()
    fake_compiler("exit 0")  # and makes nothing
    with pytest.raises(BuildError, match="failed"):
        library(tmp_path / "other")


def test_it_is_built_once_for_each_compiler(tmp_path: Path, fake_compiler) -> None:
    real = cached_step._compiler()
    fake_compiler(f'echo built >> {tmp_path / "log"}; exec {real} "$@"')
    first = library(tmp_path / "native")
    cached_step._load.cache_clear()
    assert library(tmp_path / "native") is not first
    assert (tmp_path / "log").read_text() == "built\n"
    assert len(list((tmp_path / "native").iterdir())) == 1
    os.environ["CC"] = real
    cached_step._load.cache_clear()
    library(tmp_path / "native")
    assert len(list((tmp_path / "native").iterdir())) == 2


def test_panels_hold_the_matrix_in_order() -> None:
    weight = torch.randn(70, 9)
    panels, scales = pack(weight, "float32")
    assert scales is None
    assert panels.shape == (3, 9, 32)
    assert panels.is_contiguous()
    assert torch.equal(panels.transpose(1, 2).reshape(96, 9)[:70], weight)
    assert not panels.transpose(1, 2).reshape(96, 9)[70:].any()
    assert [padded(size) for size in (0, 1, 32, 33)] == [0, 32, 32, 64]


def test_int8_rounds_to_the_nearest_of_each_output() -> None:
    weight = torch.randn(40, 16)
    weight[3] = 0
    panels, scales = pack(weight, "int8")
    assert scales is not None
    assert panels.dtype == torch.int8
    back = (panels.transpose(1, 2).reshape(64, 16).float() * scales.unsqueeze(1))[:40]
    assert ((back - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 / 2 * 1.0001).all()
    assert int(panels.abs().max()) == 127
