"""The routes and commands of schedules, through the real app, server and client."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import uvicorn

from moray.cluster.managed import local_cluster
from moray.platform.cli import schedule_commands
from moray.platform.client import Client
from moray.platform.control.auth import ensure_token
from moray.platform.control.controller import Controller
from moray.platform.control.database import Database
from moray.platform.control.options import decide_options
from moray.platform.control.ticks import local_text
from moray.platform.core.errors import MorayError
from moray.platform.core.home import Home
from moray.platform.server.app import build_controller_app

RECIPE = "name: tiny\nsteps:\n  corpus: {with: {sources: [{name: here, path: texts, include: ['*.txt']}]}}\n"


@dataclass
class Server:
    """A control plane that answers on a free port; its loop does not run, so no tick comes by itself."""

    home: Home
    folder: Path
    database: Database
    controller: Controller

    def body(self, **fields: Any) -> dict[str, Any]:
        return {"recipe": RECIPE, "folder": str(self.folder), "name": "nightly", "every": "6h"} | fields

    def dump(self) -> list[str]:
        return list(self.database.read().iterdump())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("schedules")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("some words to read")
    (folder / "tiny.yaml").write_text(RECIPE)
    home = Home(folder / "home")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    options = decide_options(home, port=port)
    database = Database(home.database)
    controller = Controller(home, database, local_cluster(home, options.cluster))
    app = build_controller_app(home, controller, dict, ensure_token(home))
    running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    listening = socket.create_server(("127.0.0.1", port))  # before anybody asks
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    yield Server(home, folder, database, controller)
    running.should_exit = True
    thread.join()
    database.close()


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Client:
    """The client of the server, which has no schedules then; the command line finds it too."""
    monkeypatch.setenv("MORAY_HOME", str(server.home.root))
    monkeypatch.chdir(server.folder)
    found = Client.from_environment()
    for row in found.get("/api/schedules"):
        found.delete(f"/api/schedules/{row['name']}")
    return found


def schedule(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `moray schedule ...` prints."""
    assert (
        schedule_commands.app(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
        == 0
    )
    return capsys.readouterr().out


def test_the_life_of_a_schedule(server: Server, client: Client) -> None:
    added = client.post("/api/schedules", server.body(cron="0 2 * * *", every=None, tz="Asia/Singapore"))
    assert (added["name"], added["recipe"], added["cron"], added["every"]) == ("nightly", "tiny", "0 2 * * *", None)
    assert (added["overlap"], added["catchup"], added["priority"], added["paused"]) == ("skip", "none", "batch", False)
    assert client.get("/api/schedules") == [client.get("/api/schedules/nightly")] == [added]
    upcoming = client.get("/api/schedules/nightly/next", n=3)
    assert upcoming["english"] == "At 02:00 every day, Asia/Singapore time"
    assert [row["local"][10:] for row in upcoming["ticks"]] == ["T02:00:00+08:00"] * 3
    assert upcoming["ticks"][0]["tick"] == added["next"]
    assert local_text(added["next"], "Asia/Singapore") == upcoming["ticks"][0]["local"]
    assert client.post("/api/schedules/nightly/pause")["paused"] is True
    assert client.get("/api/schedules/nightly")["next"] is None
    assert client.post("/api/schedules/nightly/resume")["next"] == added["next"]
    assert client.delete("/api/schedules/nightly") is None
    assert client.get("/api/schedules") == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every": None}, "neither cron nor every"),
        ({"cron": "@daily"}, "both cron and every"),
        ({"every": "90s"}, "every '90s': not an interval"),
        ({"every": None, "cron": "0 25 * * *"}, "invalid value '25' in field 2 (hour)"),
        ({"tz": "Europe/Lundon"}, "tz 'Europe/Lundon'"),
        ({"name": "No Spaces"}, "invalid schedule name"),
        ({"overlap": "replace"}, "overlap"),
        ({"catchup": "all"}, "catchup"),
        ({"priority": "urgent"}, "priority"),
        ({"retries": -1}, "retries"),
        ({"timezone": "UTC"}, "timezone"),
        ({"recipe": "steps: {}"}, "name"),
        ({"recipe": ""}, "recipe"),
        ({"recipe": "\ud800"}, "recipe"),
        ({"folder": "texts"}, "not an absolute path"),
    ],
)
def test_a_bad_body_is_refused_and_changes_nothing(
    server: Server, client: Client, fields: dict[str, Any], message: str
) -> None:
    before = server.dump()
    status, answer = raw(client, "POST", "/api/schedules", json.dumps(server.body(**fields)))
    assert status == 422
    assert message in answer["error"]
    assert "hint" in answer
    assert server.dump() == before


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/schedules/nighty", 404),
        ("GET", "/api/schedules/nighty/next", 404),
        ("POST", "/api/schedules/nighty/pause", 404),
        ("POST", "/api/schedules/nighty/resume", 404),
        ("DELETE", "/api/schedules/nighty", 404),
        ("GET", "/api/schedules/nightly/next?n=0", 422),
        ("GET", "/api/schedules/nightly/next?n=many", 422),
        ("POST", "/api/schedules/nightly/resume", 409),
        ("POST", "/api/schedules", 400),
    ],
)
def test_a_bad_request_is_refused_and_changes_nothing(
    server: Server, client: Client, method: str, path: str, status: int
) -> None:
    client.post("/api/schedules", server.body())
    before = server.dump()
    found, answer = raw(client, method, path, "{" if status == 400 else None)
    assert found == status
    assert answer["error"]
    if status == 404:
        assert answer["hint"] == "did you mean 'nightly'?"
    assert server.dump() == before


def test_a_name_is_taken_once(server: Server, client: Client) -> None:
    client.post("/api/schedules", server.body())
    before = server.dump()
    status, answer = raw(client, "POST", "/api/schedules", json.dumps(server.body(every="1h")))
    assert (status, answer["error"]) == (409, "schedule 'nightly' already exists")
    assert server.dump() == before


def test_requests_without_the_token_are_refused(server: Server, client: Client) -> None:
    stranger = Client(client.url, "wrong")
    for method, path in (
        ("GET", "/api/schedules"),
        ("POST", "/api/schedules"),
        ("GET", "/api/schedules/nightly"),
        ("GET", "/api/schedules/nightly/next"),
        ("POST", "/api/schedules/nightly/pause"),
        ("POST", "/api/schedules/nightly/resume"),
        ("DELETE", "/api/schedules/nightly"),
    ):
        assert raw(stranger, method, path)[0] == 401


def raw(client: Client, method: str, path: str, body: str | None = None) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request that the client class would turn into an error."""
    import urllib.error
    import urllib.request

    headers = {"Authorization": f"Bearer {client._token}", "Content-Type": "application/json"}
    data = None if body is None else body.encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(client.url + path, data, headers, method=method)) as answer:
            return answer.status, json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


# ------------------------------------------------------------------------------------------------------- commands


def test_the_commands(server: Server, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    printed = schedule(
        capsys,
        "add",
        "nightly",
        "tiny.yaml",
        "--cron",
        "0 2 * * *",
        "--tz",
        "Europe/London",
        "--overlap",
        "queue",
        "--set",
        "corpus.sources.0.license=MIT",
    )
    assert "nightly: At 02:00 every day, Europe/London time" in printed
    assert "02:00" in printed.splitlines()[1]
    assert "(in " in printed.splitlines()[1]
    listed = schedule(capsys, "list")
    assert all(text in listed for text in ("nightly", "tiny", "At 02:00 every day"))
    shown = schedule(capsys, "show", "nightly")
    assert "tiny --set corpus.sources.0.license=MIT" in shown
    assert "queue" in shown
    upcoming = schedule(capsys, "next", "nightly", "-n", "3").splitlines()
    assert upcoming[0] == "At 02:00 every day, Europe/London time"
    assert len(upcoming) == 4
    assert all(" 02:00 " in line for line in upcoming[1:])
    assert schedule(capsys, "pause", "nightly") == "nightly: paused\n"
    assert "moray schedule resume nightly" in schedule(capsys, "next", "nightly")
    assert "02:00" in schedule(capsys, "resume", "nightly")
    assert schedule(capsys, "rm", "nightly") == "removed nightly; its jobs are kept\n"
    assert client.get("/api/schedules") == []


def test_every_command_prints_json(server: Server, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    added = json.loads(schedule(capsys, "add", "steady", "tiny.yaml", "--every", "1h30m", "--json"))
    assert added["every"] == "1h30m"
    assert json.loads(schedule(capsys, "list", "--json")) == [added]
    assert json.loads(schedule(capsys, "show", "steady", "--json")) == added
    assert len(json.loads(schedule(capsys, "next", "steady", "--json"))["ticks"]) == 5
    assert json.loads(schedule(capsys, "pause", "steady", "--json"))["paused"] is True
    assert json.loads(schedule(capsys, "resume", "steady", "--json"))["paused"] is False
    assert json.loads(schedule(capsys, "rm", "steady", "--json")) == {"removed": "steady"}


def test_show_lists_the_outcome_of_ticks(server: Server, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    schedule(capsys, "add", "steady", "tiny.yaml", "--every", "1h")
    later = time.time() + 10.5 * 3600
    server.controller.schedules.tick(later)
    due = server.controller.schedules.get("steady").trigger.after(later)
    server.controller.schedules.tick(due)
    (job,) = server.controller.jobs.list(schedule="steady")
    shown = schedule(capsys, "show", "steady")
    assert f"run {job.id}" in shown
    assert "skipped: missed" in shown
    assert f"run {job.id}" in schedule(capsys, "list")


def test_the_zone_is_this_machine_s_unless_another_is_given(
    server: Server, client: Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", ":Australia/Lord_Howe")
    assert "Australia/Lord_Howe time" in schedule(capsys, "add", "a", "tiny.yaml", "--cron", "@daily")
    monkeypatch.setenv("TZ", "nonsense")
    assert ZoneInfo(schedule_commands.local_zone()), "what the machine says, or UTC"
    assert f"times in {schedule_commands.local_zone()}" in schedule(capsys, "add", "b", "tiny.yaml", "--every", "1h")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("add", "a", "tiny.yaml"), "neither cron nor every", "every 6h"),
        (("add", "a", "tiny.yaml", "--every", "5s"), "every '5s'", "30m"),
        (("add", "a", "tiny.yaml", "--cron", "* * * JULY *"), "field 4 (month)", "did you mean JUL?"),
        (("add", "a", "tiny.yaml", "--cron", "@daily", "--tz", "Tokyo"), "tz 'Tokyo'", "'Asia/Tokyo'"),
        (("add", "A", "tiny.yaml", "--every", "1h"), "invalid schedule name 'A'", "lower-case"),
        (("add", "a", "tiny.yml", "--every", "1h"), "tiny.yml", ""),
        (("add", "a", "tiny.yaml", "--every", "1h", "--set", "corpse.x=1"), "unknown step 'corpse'", "'corpus'?"),
        (("show", "other"), "no schedule 'other'", "steady"),
        (("next", "steady", "-n", "1000"), "between 1 and 100, got 1000", "for example 5"),
        (("next", "a/b"), "", ""),
        (("pause", "steadi"), "no schedule 'steadi'", "did you mean 'steady'?"),
        (("resume", "steady"), "is not paused", ""),
        (("rm", "steadi"), "no schedule 'steadi'", "did you mean 'steady'?"),
    ],
)  # fmt: skip
def test_a_bad_command_is_refused_and_changes_nothing(
    server: Server,
    client: Client,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
    hint: str,
) -> None:
    schedule(capsys, "add", "steady", "tiny.yaml", "--every", "1h")
    before = server.dump()
    with pytest.raises(MorayError) as caught:
        schedule(capsys, *arguments)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2
    assert server.dump() == before
    assert os.environ["MORAY_HOME"] == str(server.home.root)
