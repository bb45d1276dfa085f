"""`moray doctor`: reports problems with their fixes, and passes on this machine."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from moray.platform import api
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.run import doctor


def test_this_machine_can_run_the_tests() -> None:
    assert not [found for found in doctor.examine() if found.state == "fail"]


def test_whatever_is_not_well_has_a_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MORAY_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = doctor.examine()
    assert {f.name for f in found if f.state == "fail"} == {"home"}
    assert "compiler" in {f.name for f in found if f.state == "warn"}
    assert all(f.fix for f in found if f.state != "ok")
    assert "  -> " in "\n".join(doctor.report_lines(found))


def test_too_little_memory_or_disk_stops_a_run_before_it_starts(monkeypatch: pytest.MonkeyPatch, home: Home) -> None:
    monkeypatch.setenv("MORAY_HOME", str(home.root))
    monkeypatch.setattr(doctor, "_available_memory", lambda: 1 << 30)
    with pytest.raises(InputError, match=r"memory: 1\.0 GiB available"):
        api.run("quickstart", home=home)
    monkeypatch.setattr(doctor, "_available_memory", lambda: 8 << 30)
    usage = shutil.disk_usage(home.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(InputError, match=r"0\.0 GiB free") as caught:
        api.run("quickstart", home=home)
    assert "free disk space" in caught.value.hint
    assert not list(home.root.iterdir()), "nothing was started"


def test_a_taken_port_is_seen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert doctor._port(port).state == "warn"
    assert doctor._port(port).state == "ok"
