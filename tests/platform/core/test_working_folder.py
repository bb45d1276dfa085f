"""Threads work in their own current folders concurrently."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moray.platform.core.errors import InputError
from moray.platform.core.working_folder import in_folder


def test_several_at_once_each_have_their_own_and_the_process_keeps_its(tmp_path: Path) -> None:
    here, everyone = Path.cwd(), threading.Barrier(4)

    def work(name: str) -> str:
        (tmp_path / name).mkdir()

        def look() -> str:
            everyone.wait(30)
            return os.getcwd()

        return in_folder(tmp_path / name, look, 60)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, "abcd")) == [str(tmp_path / name) for name in "abcd"]
    assert Path.cwd() == here


def test_a_hanging_folder_delays_no_other(tmp_path: Path) -> None:
    """Like a file on a hanging file system: a pipe without a writer."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"took more than 0 s"):
        in_folder(tmp_path, lambda: Path("pipe").read_text(), 0.2)
    assert in_folder(tmp_path, lambda: Path("pipe").exists(), 60)
    os.close(os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK))


def test_errors_come_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        in_folder(tmp_path, lambda: Path("none").read_text(), 60)
    with pytest.raises(FileNotFoundError):
        in_folder(tmp_path / "gone", lambda: 1, 60)
