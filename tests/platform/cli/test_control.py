"""The control plane's commands without a control plane, and with bad input: one error, one hint, exit 2."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy

from moray.cluster.local import short_folder
from moray.cluster.machine import ray_environment, usable_by_ray
from moray.platform.cli import job_commands
from moray.platform.control.database import Database
from moray.platform.control.up import systemd_unit
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.run.mlflow_tracking import database_uri
from tests.command_line import run_command


def moray(home: Home, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command(home.root, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("list",),
        ("status",),
        ("status", "some-job"),
        ("logs", "some-job"),
        ("stop", "some-job"),
        ("why", "some-job"),
        ("submit", "quickstart"),
        ("schedule", "list"),
        ("schedule", "rm", "nightly"),
    ],
    ids=" ".join,
)
def test_without_a_control_plane_every_command_says_how_to_start_one(home: Home, arguments: tuple[str, ...]) -> None:
    done = moray(home, *arguments)
    assert done.returncode == 2, done.stderr
    error = f"error: no control plane was started for {home.root} yet"
    assert done.stderr.splitlines() == [error, "hint: start it: moray up"]
    assert not home.database.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("up", "--cpus", "0"), "--cpus 0: this machine has"),
        (("up", "--cpus", "100000"), "--cpus 100000: this machine has"),
        (("up", "--gpus", "1000"), "--gpus 1000: this machine has"),
        (("up", "--slots", "0"), "--slots 0: at least one slot"),
        (("up", "--slots", "many"), "many"),
        (("cluster", "up", "moon"), "moon"),
        (("submit", "no-such-recipe"), "unknown recipe 'no-such-recipe'"),
        (("submit", "quickstart", "--priority", "urgent"), "urgent"),
        (("logs",), "parameter"),
    ],
)
def test_bad_input_starts_nothing(home: Home, arguments: tuple[str, ...], said: str) -> None:
    done = moray(home, *arguments)
    assert done.returncode == 2, done.stderr
    assert said.lower() in done.stderr.lower()
    assert done.stderr.startswith("error: ")
    assert not (home.up / "state.json").exists()


def test_a_port_in_use_is_named_with_a_free_one(home: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = moray(home, "up", "--port", str(port))
    assert done.returncode == 2
    error, hint = done.stderr.splitlines()
    assert error == f"error: port {port} of 127.0.0.1 is in use"
    assert hint.startswith("hint: try --port ")
    assert not (home.up / "state.json").exists()


def test_a_stopped_control_plane_is_reported_immediately(home: Home) -> None:
    home.up.mkdir()
    cluster = {
        "ray_port": 1, "dashboard_port": 1, "client_port": 1, "cpus": 1, "gpus": 0, "memory_bytes": 1, "slots": 1,
    }  # fmt: skip
    (home.up / "options.json").write_text(json.dumps({"port": 1, "cluster": cluster}))
    home.token.touch(mode=0o600)
    home.token.write_text("token")
    done = moray(home, "list")
    assert done.returncode == 1
    assert "the control plane does not respond at http://127.0.0.1:1" in done.stderr
    assert "hint: start it with `moray up`" in done.stderr
    (home.up / "options.json").write_text("{}")
    assert "is invalid or from another version of Moray" in moray(home, "list").stderr


def test_down_where_nothing_runs_is_no_error(home: Home) -> None:
    done = moray(home, "down", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"processes": 0})


def test_the_systemd_unit_runs_the_supervisor_of_this_home(home: Home) -> None:
    printed = moray(home, "up", "--systemd").stdout
    assert printed == systemd_unit(home)
    assert f'Environment="MORAY_HOME={home.root}"' in printed
    assert "ExecStart=" in printed


ODD_NAMES = ["my home", "no#1", "a%20b", "what?", "hc-é", "it's", "a$b\\c", 'q"x', "a&b=c;d"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_home_may_be_anywhere(tmp_path: Path, name: str) -> None:
    """A database at an address that was not quoted was another file, and nothing was found in the right one."""
    home = Home(tmp_path / name)
    home.root.mkdir()
    database = Database(home.database, durable=False)
    with database.write() as connection:
        connection.execute("CREATE TABLE odd (name TEXT)")
    assert database.read().execute("SELECT count(*) FROM odd").fetchone()[0] == 0
    database.close()
    engine = sqlalchemy.create_engine(database_uri(home))
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE odd (name TEXT)"))
    engine.dispose()
    assert home.mlflow_db.exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_systemd_unit_may_name_any_home(tmp_path: Path, name: str) -> None:
    home = Home(tmp_path / name)
    home.root.mkdir()
    lines = systemd_unit(home).splitlines()
    setting = next(line for line in lines if "MORAY_HOME" in line).removeprefix("Environment=")
    assert shlex.split(setting)[0].replace("%%", "%") == f"MORAY_HOME={home.root}"
    start = next(line for line in lines if line.startswith("ExecStart="))
    assert shlex.split(start.removeprefix("ExecStart=")) == [sys.executable, "-P", "-m", "moray.platform.control.up"]


def test_ray_gets_a_folder_without_blanks(tmp_path: Path) -> None:
    for root in (tmp_path / "my home", Path("/tmp/it's"), Path("/tmp/" + "long" * 20)):
        assert not usable_by_ray(root / "ray" / "up")
        assert usable_by_ray(short_folder(Home(root)))
    assert usable_by_ray(Path("/home/me/.moray/ray/up"))


@pytest.mark.parametrize("name", ["", "/", "a/b", "../.."])
def test_no_name_of_a_job_is_another_address(name: str) -> None:
    """`moray status /` asked for the list of all jobs."""
    with pytest.raises(InputError):
        job_commands._quoted(name)


def test_module_folders_are_those_of_the_starting_process(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Services work in another folder: a path that is relative to this one would be another there."""
    monkeypatch.setenv("PYTHONPATH", f"plug{os.pathsep}/opt/more")
    assert {str(Path("plug").absolute()), "/opt/more"} <= set(ray_environment(home)["PYTHONPATH"].split(os.pathsep))
