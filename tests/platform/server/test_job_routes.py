"""Every route of the control plane: without a token, with bad input, and what it leaves unchanged.

The application is the controller's own; its Ray cluster is at a port where nobody listens, so jobs stay queued.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from moray.cluster.managed import local_cluster
from moray.platform.control.auth import OPEN, ensure_token, read_token
from moray.platform.control.controller import Controller
from moray.platform.control.database import SCHEMA_VERSION, Database
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home
from moray.platform.server.app import build_controller_app
from moray.platform.server.overview import Overview
from tests.checkout import ROOT
from tests.small_run import recipe_text, write_text


@dataclass(frozen=True)
class Plane:
    home: Home
    app: FastAPI
    http: TestClient
    controller: Controller
    database: Database
    text: Path

    def body(self, **fields: Any) -> dict[str, Any]:
        return {"recipe": recipe_text(self.text), "folder": str(self.text)} | fields

    def everything(self) -> list[tuple[Any, ...]]:
        """Every row that a request could have changed."""
        tables = ("jobs", "attempts", "schedules", "ticks", "transitions")
        return [tuple(row) for table in tables for row in self.database.read().execute(f"SELECT * FROM {table}")]


@pytest.fixture
def plane(home: Home, tmp_path: Path) -> Iterator[Plane]:
    from moray.cluster.local import LocalCluster, LocalOptions

    cluster = LocalOptions(ray_port=1, dashboard_port=1, client_port=1, cpus=1, gpus=0, memory_bytes=1 << 30, slots=1)
    text = tmp_path / "text"
    text.mkdir()
    write_text(text)
    home.up.mkdir()
    local = LocalCluster(home, cluster)
    local.token.write_text("ray")
    database = Database(home.database, durable=False)
    controller = Controller(home, database, local_cluster(home, cluster), log=lambda _: None)
    app = build_controller_app(home, controller, Overview(home, controller), ensure_token(home))
    with TestClient(app, base_url="http://127.0.0.1:8400") as http:
        http.headers["Authorization"] = f"Bearer {read_token(home)}"
        yield Plane(home, app, http, controller, database, text)


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of every route, with parameters filled in."""
    found = []
    waiting: list[Any] = list(app.routes)
    while waiting:
        route = waiting.pop()
        if isinstance(route, APIRoute):
            path = re.sub(r"\{[^}]*\}", "x", route.path)
            found += [(method, path) for method in route.methods]
        waiting += getattr(getattr(route, "original_router", None), "routes", [])
        waiting += getattr(route, "routes", []) or []
    return found


def test_no_route_but_health_and_login_answers_without_the_token(plane: Plane) -> None:
    found = routes(plane.app)
    assert len(found) > 20, found
    before = plane.everything()
    for token in (None, "", "wrong", read_token(plane.home) + "x", read_token(plane.home)[:-1]):
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        with TestClient(plane.app, base_url="http://127.0.0.1:8400", follow_redirects=False) as http:
            for method, path in found:
                answer = http.request(method, path, headers=headers)
                if path in OPEN:
                    assert answer.status_code != 500
                else:
                    assert answer.status_code == 401, f"{method} {path} with {token!r}: {answer.status_code}"
    assert plane.everything() == before


def test_a_browser_without_the_token_is_sent_to_the_form(plane: Plane) -> None:
    with TestClient(plane.app, base_url="http://127.0.0.1:8400", follow_redirects=False) as http:
        answer = http.get("/jobs/some-job", headers={"Accept": "text/html,*/*;q=0.8"})
        assert (answer.status_code, answer.headers["Location"]) == (303, "/login?next=%2Fjobs%2Fsome-job")
        assert http.post("/api/jobs", headers={"Accept": "text/html"}).status_code == 401


def test_the_token_counts_as_bearer_and_as_cookie_and_only_as_that(plane: Plane) -> None:
    token = read_token(plane.home)
    with TestClient(plane.app, base_url="http://127.0.0.1:8400") as http:
        assert http.get("/api/jobs", headers={"Authorization": f"bearer {token}"}).status_code == 200
        assert http.get("/api/jobs", headers={"Cookie": f"moray_token={token}"}).status_code == 200
        assert http.get("/api/jobs", headers={"Authorization": f"Basic {token}"}).status_code == 401
        assert http.get(f"/api/jobs?token={token}").status_code == 401
        assert http.get("/api/jobs", headers={"Cookie": "moray_token=; x=\x7f"}).status_code == 401


def test_a_token_that_others_can_read_is_refused(home: Home) -> None:
    ensure_token(home)
    assert home.token.stat().st_mode & 0o777 == 0o600
    assert ensure_token(home) == read_token(home)
    home.token.chmod(0o644)
    with pytest.raises(InputError, match="readable by other users"):
        read_token(home)


BAD = [
    ({"recipe": ""}, "recipe"),
    ({"recipe": "name: x"}, "steps"),
    ({"recipe": "name: x\nsteps:\n  corpse: {}"}, "corpse"),
    ({"recipe": 7}, "recipe"),
    ({"set": ["nonsense"]}, "STEP.FIELD=VALUE"),
    ({"set": "a.b=1"}, "set"),
    ({"priority": "urgent"}, "priority"),
    ({"retries": -1}, "retries"),
    ({"retries": "many"}, "retries"),
    ({"retires": 1}, "retires"),
    ({"folder": "/no/such/folder"}, "/no/such/folder"),
    ({"folder": "relative"}, "relative"),
    ({"name": "x" * 300}, "name"),
]


@pytest.mark.parametrize(("change", "named"), BAD, ids=[str(change)[:40] for change, _ in BAD])
def test_a_bad_submission_is_refused_and_changes_nothing(plane: Plane, change: dict[str, Any], named: str) -> None:
    before = plane.everything()
    answer = plane.http.post("/api/jobs", json=plane.body(**change))
    assert answer.status_code == 422, answer.text
    assert named in answer.json()["error"], answer.json()
    assert "hint" in answer.json()
    assert plane.everything() == before


def test_a_body_that_is_not_json_is_400(plane: Plane) -> None:
    answer = plane.http.post("/api/jobs", content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["error"]


def test_submit_list_show_why_stop(plane: Plane) -> None:
    made = plane.http.post("/api/jobs", json=plane.body(name="mine", priority="batch"))
    assert made.status_code == 201
    job = made.json()
    assert (job["name"], job["priority"], job["state"]) == ("mine", "batch", "queued")
    assert plane.http.get("/api/jobs").json() == [job]
    assert plane.http.get(f"/api/jobs/{job['id'][-6:]}").json() == job, "a part of the id is enough"
    plane.controller.round()
    lines = plane.http.get(f"/api/jobs/{job['id']}/why").json()["lines"]
    assert any("the cluster is unreachable" in line for line in lines), lines
    assert plane.http.get(f"/api/jobs/{job['id']}/logs").json()["text"] == ""
    stopped = plane.http.post(f"/api/jobs/{job['id']}/stop")
    assert stopped.json()["state"] == "cancelled"
    again = plane.http.post(f"/api/jobs/{job['id']}/stop")
    assert (again.status_code, again.json()["error"]) == (409, f"job {job['id']} has already ended (cancelled)")


def test_one_idempotency_key_is_one_job(plane: Plane) -> None:
    first = plane.http.post("/api/jobs", json=plane.body(), headers={"Idempotency-Key": "k"})
    second = plane.http.post("/api/jobs", json=plane.body(), headers={"Idempotency-Key": "k"})
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/jobs/nothing", 404),
        ("POST", "/api/jobs/nothing/stop", 404),
        ("GET", "/api/jobs/nothing/why", 404),
        ("GET", "/api/jobs/nothing/logs", 404),
        ("GET", "/api/jobs/nothing/run", 404),
        ("GET", "/api/jobs?state=quiet", 422),
        ("GET", "/api/jobs?limit=0", 422),
        ("GET", "/api/jobs?limit=some", 422),
        ("GET", "/api/schedules/nothing", 404),
        ("GET", "/api/schedules/nothing/next", 404),
        ("POST", "/api/schedules/nothing/pause", 404),
        ("DELETE", "/api/schedules/nothing", 404),
        ("GET", "/api/joobs", 404),
        ("DELETE", "/api/jobs", 405),
        ("GET", "/mlflow/", 503),
    ],
)
def test_unknown_things_are_not_found(plane: Plane, method: str, path: str, status: int) -> None:
    before = plane.everything()
    answer = plane.http.request(method, path)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]
    assert plane.everything() == before


def test_logs_are_read_in_parts_and_offsets_checked(plane: Plane) -> None:
    job = plane.http.post("/api/jobs", json=plane.body()).json()
    attempt = plane.controller.jobs.new_attempt(job["id"])
    log = plane.home.runs / attempt.id / "logs" / "driver.txt"
    log.parent.mkdir(parents=True)
    line = "ä line of text\n"
    log.write_text(line * 30_000 + "half a l")
    text, offset, ended = "", 0, False
    for _ in range(10):
        part = plane.http.get(f"/api/jobs/{job['id']}/logs?offset={offset}").json()
        text, offset, ended = text + part["text"], part["offset"], part["ended"]
    assert text == line * 30_000, "a line that is being written is not shown yet"
    assert not ended
    plane.controller.jobs.move_attempt(attempt.id, "failed")
    rest = plane.http.get(f"/api/jobs/{job['id']}/logs?offset={offset}").json()
    assert (rest["text"], rest["ended"]) == ("half a l", True)
    assert plane.http.get(f"/api/jobs/{job['id']}/logs?offset=99999999").status_code == 422
    assert plane.http.get(f"/api/jobs/{job['id']}/logs?attempt=2").status_code == 404


def test_a_line_longer_than_a_part_is_cut_between_characters(plane: Plane) -> None:
    job = plane.http.post("/api/jobs", json=plane.body()).json()
    attempt = plane.controller.jobs.new_attempt(job["id"])
    log = plane.home.runs / attempt.id / "logs" / "driver.txt"
    log.parent.mkdir(parents=True)
    written = "x" + "äあ😀" * 60_000  # nine bytes each: a part ends within a character
    log.write_text(written + "\n")
    text, offset = "", 0
    for _ in range(4):
        part = plane.http.get(f"/api/jobs/{job['id']}/logs?offset={offset}").json()
        text, offset = text + part["text"], part["offset"]
    assert text == written + "\n"


def test_the_overview_says_that_the_cluster_is_away(plane: Plane) -> None:
    found = plane.http.get("/api/overview").json()
    assert found["cluster"]["alive"] is False
    assert found["cluster"]["detail"]


def test_the_examples_in_the_documentation_have_the_fields_of_the_answers(plane: Plane) -> None:
    text = (ROOT / "docs" / "http-api.md").read_text()
    shown = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, flags=re.S)]
    job = plane.http.post("/api/jobs", json=plane.body()).json()
    plane.controller.jobs.new_attempt(job["id"])
    every = {"name": "often", "every": "1h", "tz": "UTC"}
    assert plane.http.post("/api/schedules", json=plane.body(**every)).status_code == 201
    (plane.home.root / "model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (plane.home.root / "model" / name).write_text("{}")
    deployed = plane.http.post("/api/deployments", json={"model": str(plane.home.root / "model")})
    assert deployed.status_code == 201
    paths = (
        f"/api/jobs/{job['id']}",
        "/api/overview",
        f"/api/jobs/{job['id']}/run",
        "/api/schedules/often",
        "/api/deployments/model",
    )
    answers = [plane.http.get(path).json() for path in paths]
    for example, answer in zip(shown, answers, strict=True):
        assert example.keys() == answer.keys(), example.keys() ^ answer.keys()
    assert shown[0]["attempts"][0].keys() == answers[0]["attempts"][0].keys()
    assert shown[1]["cluster"].keys() == answers[1]["cluster"].keys()
    assert shown[2]["steps"][0].keys() == answers[2]["steps"][0].keys()
    assert shown[4]["versions"][0].keys() == answers[4]["versions"][0].keys()
    assert shown[4]["served"].keys() == answers[4]["served"].keys()


def test_a_database_of_a_newer_moray_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "moray.db"
    database = Database(path)
    with database.write() as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
    database._writer.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    database.close()
    with pytest.raises(InputError, match=f"schema version {SCHEMA_VERSION + 1}"):
        Database(path)


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / "moray.db")

    def half() -> None:
        with database.write():
            database.record("job", "x", "queued")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        half()
    assert database.read().execute("SELECT count(*) AS n FROM transitions").fetchone()["n"] == 0


def test_punctuation_is_no_part_of_a_job_s_name(plane: Plane) -> None:
    """With one job, `stop -` ended it: every id has a dash."""
    job = plane.http.post("/api/jobs", json=plane.body(name="ab small-model")).json()
    other = plane.http.post("/api/jobs", json=plane.body(name="x")).json()
    for name in ("-", "%25", "_", "20", "ab", " "):
        assert plane.http.get(f"/api/jobs/{name}").status_code == 404, name
    assert plane.http.get("/api/jobs/small-m").json()["id"] == job["id"]
    assert plane.http.get("/api/jobs/x").json()["id"] == other["id"], "a whole name may be short"
