"""Process identity does not depend on the wall clock; marks find a service's processes without any state file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from moray.platform.core.processes import Process, _variables, marked, marks

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    home = tmp_path / "home"
    home.mkdir()
    with subprocess.Popen(SLEEP, env={**os.environ, **marks(home, "mlflow")}, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child
        child.kill()


def test_a_step_of_the_clock_makes_no_process_another(
    service: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells a start in ticks since boot, and psutil adds when that was, which a step moves."""
    process = Process.of(service.pid)
    assert process is not None
    monkeypatch.setattr(psutil, "boot_time", lambda: 0.0)
    assert process.alive()
    assert Process.of(service.pid) == process
    assert not Process(service.pid, "another boot:1").alive()
    service.kill()
    service.wait()
    assert not process.alive()


def test_marks_are_found_by_any_name_of_the_folder_and_after_it_was_renamed(
    service: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    (tmp_path / "link").symlink_to(home)
    for folder in (home, tmp_path / "link"):
        assert [process.pid for process in marked(folder, "mlflow")] == [service.pid]
        assert marked(folder, "controller") == []
    (tmp_path / "other").mkdir()
    assert marked(tmp_path / "other", "mlflow") == []
    renamed = home.rename(tmp_path / "renamed")
    assert [process.pid for process in marked(renamed, "mlflow")] == [service.pid]


def test_variables_are_found_behind_a_title_that_was_written_over_the_first() -> None:
    """As Ray's agents do; psutil stops at the first empty one."""
    raw = b"ray::DashboardAgent   \0\0\0TERM=dumb\0\0MORAY_SERVICE=/home/x:ray-head\0PATH=a=b\0"
    assert _variables(raw) == {"TERM": "dumb", "MORAY_SERVICE": "/home/x:ray-head", "PATH": "a=b"}
