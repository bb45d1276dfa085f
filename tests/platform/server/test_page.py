"""The page in a real browser, against a real server over real data."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from moray.platform.control import serving_reports
from moray.platform.control.jobs import Job
from moray.platform.core.events import MetricEvent, RunEvent, ScoreEvent
from moray.platform.core.serving import ReplicaSeen
from tests.checkout import ROOT
from tests.page_server import (
    Model,
    PageServer,
    add_deployment,
    add_schedules,
    log_of,
    model_server,
    page_server,
    report,
    see_replicas,
    several_deployments,
    step,
    training,
    up_to_pretrain,
)

PAGE = ROOT / "platform" / "server" / "page"
EVIL = "<img src=x onerror=document.title='owned'>"
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


def test_the_whole_page_is_small() -> None:
    assert sum(path.stat().st_size for path in PAGE.iterdir()) < 300_000


def test_the_page_names_no_other_place() -> None:
    for path in (p for p in PAGE.iterdir() if p.suffix in (".html", ".js", ".css")):
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text())) - {"http://www.w3.org"}
        assert not found, f"{path.name}: {found}"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", path.read_text())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    with page_server(tmp_path) as running:
        yield running


class Client(requests.Session):
    """Asks one server, with its token if it is given."""

    def __init__(self, url: str, token: str = "") -> None:
        super().__init__()
        self.url = url
        if token:
            self.headers["Authorization"] = f"Bearer {token}"

    def request(self, method: str, url: str, **options: Any) -> requests.Response:  # type: ignore[override]
        return super().request(method, self.url + url, **options | {"timeout": 60, "allow_redirects": False})


@pytest.fixture
def http(server: PageServer) -> Iterator[Client]:
    with Client(server.url, server.token) as client:
        yield client


def test_only_the_login_is_open(server: PageServer) -> None:
    with Client(server.url) as stranger:
        assert stranger.get("/login").status_code == 200
        assert stranger.get("/", headers={"Accept": "text/html"}).headers["location"] == "/login"
        for path in ("/static/app.js", "/api/stream", "/api/overview", "/jobs/x", "/schedules", "/deployments"):
            assert stranger.get(path).status_code == 401, path
        wrong = stranger.post("/login", json={"token": "x"})
        assert (wrong.status_code, wrong.json()["error"]) == (401, "wrong token")
        assert "set-cookie" not in wrong.headers
        right = stranger.post("/login", json={"token": server.token})
        assert right.status_code == 204
        assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(right.headers["set-cookie"].split("; "))
        assert stranger.get("/static/app.js").status_code == 200
        stranger.post("/logout")
        assert stranger.get("/static/app.js").status_code == 401


def test_every_answer_is_guarded(http: Client) -> None:
    for path in ("/", "/login", "/api/overview", "/static/app.js", "/api/none"):
        headers = http.get(path).headers
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "same-origin")
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
    policy = http.get("/login").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert http.get("/health", headers={"Host": "rebound.example:8400"}).status_code == 400
    assert http.get("/health", headers={"Host": "localhost:8400"}).status_code == 200


def test_another_page_of_this_machine_may_change_nothing(server: PageServer, http: Client) -> None:
    job = server.submit()
    there = {"Origin": "http://127.0.0.1:3000"}
    assert http.post(f"/api/jobs/{job.id}/stop", headers=there).status_code == 403
    assert server.controller.jobs.get(job.id).state == "queued"
    assert http.post(f"/api/jobs/{job.id}/stop", headers={"Origin": server.url}).status_code == 200


def test_files_are_asked_for_again_only_when_they_changed(http: Client) -> None:
    first = http.get("/static/app.js")
    assert http.get("/static/app.js", headers={"If-None-Match": first.headers["etag"]}).status_code == 304
    assert http.get("/static/..%2fcli.py").status_code == 404
    assert http.get("/static/none.js").status_code == 404


def events(stream: requests.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in stream.iter_lines(chunk_size=1, decode_unicode=True):
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def test_a_stream_sends_the_state_at_once_and_then_changes(server: PageServer, http: Client) -> None:
    job = server.submit("first")
    with http.get("/api/stream", stream=True) as one, http.get("/api/stream", stream=True) as other:
        seen, too = events(one), events(other)
        name, state = next(seen)
        assert (name, [j["id"] for j in state["queued"]]) == ("overview", [job.id])
        assert next(too)[1]["queued"] == state["queued"]
        log = server.start(job)
        up_to_pretrain(log)
        assert any(s["running"] and s["running"][0]["run"]["step"] == "pretrain" for _, s in seen)
        assert any(s["running"] for _, s in too), "every client is told"


def test_the_stream_of_a_run(server: PageServer, http: Client) -> None:
    job = server.submit()
    log = server.start(job)
    with http.get(f"/api/jobs/{job.id}/stream?attempt=1", stream=True) as stream:
        seen = events(stream)
        name, state = next(seen)
        assert (name, state["attempt"]) == ("run", f"{job.id}.1")
        log.append(MetricEvent(step="pretrain", name="train_loss", value=8.0, at=1))
        assert any(s["curves"] == {"train_loss": [[1, 8.0]]} for _, s in seen)
    assert http.get(f"/api/jobs/{job.id}/run?attempt=7").status_code == 404
    assert http.get(f"/api/jobs/{job.id}/stream?attempt=7").status_code == 404
    assert http.get("/api/jobs/none/stream").status_code == 404


def test_the_server_stops_while_somebody_listens(tmp_path: Path) -> None:
    with page_server(tmp_path) as server:
        stream = Client(server.url, server.token).get("/api/stream", stream=True)
        assert next(events(stream))[0] == "overview"
    stream.close()


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        text = "no Chromium on the path: apt-get install chromium"
        pytest.fail(text) if "CI" in os.environ else pytest.skip(text)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport={"width": 1440, "height": 900}, timezone_id="Europe/Berlin")
    made.set_default_timeout(20_000)
    yield made
    made.close()


@pytest.fixture
def page(server: PageServer, context: BrowserContext) -> Iterator[Page]:
    """A page that is logged in; in the end nothing may have been said on its console or asked of anybody else."""
    said: list[str] = []
    asked: list[str] = []

    def note(request: Request) -> None:
        asked.append(request.url)

    opened = context.new_page()
    opened.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", note)
    log_in(opened, server)
    yield opened
    assert not said
    assert not [url for url in asked if not url.startswith((server.url, "data:"))]


def log_in(page: Page, server: PageServer) -> None:
    page.goto(f"{server.url}/login#token={server.token}")
    page.wait_for_url(f"{server.url}/")
    expect(page.locator("#live")).to_have_attribute("data-state", "live")


expect.set_options(timeout=20_000)  # a busy machine; what is there sooner is seen sooner


def test_login(server: PageServer, context: BrowserContext) -> None:
    page = context.new_page()
    page.goto(server.url)
    expect(page).to_have_url(f"{server.url}/login")
    page.get_by_label("Token").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("wrong token. Hint: the token is in $MORAY_HOME/token")
    page.get_by_label("Token").fill(server.token)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="Nothing has run yet")).to_be_visible()
    expect(page.get_by_text("moray submit quickstart")).to_be_visible()
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_url(f"{server.url}/login")


def test_login_by_the_address_that_up_prints(server: PageServer, context: BrowserContext) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/login#token=wrong")
    expect(page.get_by_role("alert")).to_contain_text("wrong token")
    expect(page).to_have_url(f"{server.url}/login")
    page.goto(f"{server.url}/login#token={server.token}")
    expect(page).to_have_url(f"{server.url}/")
    page.go_back()
    assert server.token not in page.url, "the token is in no history"


@pytest.mark.parametrize(
    ("wanted", "reached"), [("/schedules", "/schedules"), ("//elsewhere.example/", "/"), ("javascript:alert(1)", "/")]
)
def test_login_leads_where_one_wanted_to_go(
    server: PageServer, context: BrowserContext, wanted: str, reached: str
) -> None:
    page = context.new_page()
    page.goto(f"{server.url}/login?next={wanted}#token={server.token}")
    expect(page.locator("main h1")).to_be_visible()
    expect(page).to_have_url(server.url + reached)


def several_jobs(server: PageServer) -> Job:
    """One that runs, two that wait, one that failed; returns the running one."""
    failed = server.submit("broken")
    server.start(failed)
    server.end(failed, "failed", "step 'corpus' failed: no space left")
    running = server.submit("at-work")
    log = server.start(running)
    up_to_pretrain(log)
    training(log, 0, 50, 200)
    server.submit("later", priority="batch")
    server.submit("sooner", priority="production")
    return running


def test_the_overview_shows_every_job_and_changes_by_itself(server: PageServer, page: Page) -> None:
    several_jobs(server)
    running = page.get_by_role("region", name="Running")
    expect(running).to_contain_text("at-work")
    expect(running).to_contain_text("pretrain · training · 25 %")
    expect(running).to_contain_text("6 of 8 steps")
    queue = page.get_by_role("region", name="Queue").get_by_role("listitem")
    expect(queue).to_have_count(2)
    expect(queue.first).to_contain_text("sooner")
    expect(queue.first).to_contain_text("production")
    expect(page.get_by_role("region", name="Recent")).to_contain_text("step 'corpus' failed: no space left")
    expect(page.get_by_role("region", name="Cluster")).to_contain_text("1 of 2")
    expect(page.get_by_role("region", name="Cluster")).to_contain_text("2 nodes, 1 dead")
    expect(page).to_have_title("1 running · Moray")


def test_the_overview_shows_the_hosts_of_other_clusters(server: PageServer, page: Page) -> None:
    lab = server.controller.cluster("lab")
    lab.round()
    lab.drivers = {"20261101-120000-prose-1a2b3c.1": "10.0.0.7"}
    card = page.get_by_role("region", name="Other clusters")
    expect(card).to_contain_text("30 nodes, 1 dead")
    expect(card).to_contain_text("145 of 232")
    expect(card).to_contain_text("10.0.0.9dead")
    expect(card.get_by_role("link", name="driver")).to_have_attribute("href", "/jobs/20261101-120000-prose-1a2b3c")
    expect(card).to_contain_text("and 21 more")
    expect(card).to_contain_text("pending demand: 3 x 1 CPU and 4 GB memory")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/clusters.png", full_page=True)
    lab.error, lab.usage = "Ray's dashboard does not respond: ConnectionError", None
    expect(card).to_contain_text("does not respond")


def test_a_run_is_followed_as_it_writes_its_events(server: PageServer, page: Page) -> None:
    job = server.submit()
    page.goto(f"{server.url}/jobs/{job.id}")
    expect(page.get_by_role("button", name="corpus: pending")).to_be_visible()
    expect(page.get_by_text("Why this job is waiting")).to_be_visible()
    log = server.start(job)
    up_to_pretrain(log)
    training(log, 0, 100, 200)
    server.print(job, "> pretrain  never run\n")
    expect(page.get_by_role("button", name="pretrain: started, 50 %")).to_be_visible()
    expect(page.get_by_text("Why this job is waiting")).to_be_hidden()
    expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "50")
    expect(page.locator(".detail")).to_contain_text("51,200 of 102,400 tokens")
    expect(page.locator("[data-curve=train_loss]")).to_contain_text("at step 100")
    expect(page.locator(".curves .card").nth(1)).to_contain_text("Throughput")
    expect(page.locator("[data-curve='train_mfu/whole']")).to_contain_text(re.compile(r"MFU \(full attention\).* %"))
    expect(page.locator("[data-curve=train_memory_bytes]")).to_contain_text("GiB at step 100")
    assert not [text for text in page.locator(".chart-title").all_inner_texts() if "_" in text or "train " in text]
    expect(page.locator(".heat-card canvas")).to_have_attribute("aria-label", re.compile("layer 3, step 100"))
    expect(page.get_by_role("log")).to_contain_text("> pretrain never run")
    page.get_by_role("button", name="tokenizer: succeeded").click()
    expect(page.locator(".detail")).to_contain_text("byte-level BPE")
    training(log, 100, 200, 200)
    server.print(job, "+ pretrain  done\n")
    expect(page.locator("[data-curve=train_loss]")).to_contain_text("at step 200")
    expect(page.locator(".detail")).to_contain_text("byte-level BPE")  # the choice stays
    log.append(step("pretrain", "succeeded", seconds=71.0, outcome="loss 8.3 -> 5.3"))
    log.append(RunEvent(state="succeeded", recipe="prose"))
    server.end(job, "succeeded")
    expect(page.get_by_role("button", name="pretrain: succeeded")).to_be_visible()
    expect(page.locator(".run-head")).to_contain_text("took")
    expect(page.get_by_role("button", name="Stop")).to_have_count(0)
    expect(page.get_by_role("log")).to_contain_text("+ pretrain done")


def test_scores_of_an_evaluation_have_their_intervals(server: PageServer, page: Page) -> None:
    job = server.submit()
    log = server.start(job)
    up_to_pretrain(log)
    for n, (task, metric, value, interval) in enumerate(
        [("geography", "accuracy", 0.812, (0.7, 0.9)), ("people", "word_perplexity", 31.4, None)]
    ):
        log.append(
            ScoreEvent(step="pretrain", task=task, metric=metric, value=value, n=40 * (n + 1), interval=interval)
        )
    page.goto(f"{server.url}/jobs/{job.id}")
    rows = page.locator(".scores tbody tr")
    expect(rows.nth(0)).to_contain_text("81.2 %")
    expect(rows.nth(0)).to_contain_text("70.0 % to 90.0 %")
    expect(rows.nth(0).locator(".interval i")).to_have_attribute("style", re.compile(r"left: 70%; width: 20%"))
    expect(rows.nth(1)).to_contain_text("word perplexity")
    expect(rows.nth(1)).to_contain_text("unknown")
    expect(rows.nth(1).locator(".interval")).to_have_count(0)


def test_charts_answer_to_pointer_and_keys(server: PageServer, page: Page) -> None:
    job = several_jobs(server)
    page.get_by_role("link", name="at-work").click()
    expect(page).to_have_url(f"{server.url}/jobs/{job.id}")
    loss, rate = page.locator("[data-curve=train_loss]"), page.locator("[data-curve=train_tokens_per_second]")
    expect(loss).to_contain_text("at step 50")
    loss.get_by_role("img").focus()
    page.keyboard.press("Home")
    expect(loss).to_contain_text("at step 1")
    expect(rate).to_contain_text("at step 1")  # all charts share the cursor
    page.keyboard.press("ArrowRight")
    expect(rate).to_contain_text("at step 2")
    rate.get_by_role("img").hover()
    expect(loss).to_contain_text(re.compile(r"at step 2\d"))
    page.locator(".heat-card canvas").hover()
    expect(page.locator(".heat-card .chart-value")).to_contain_text("layer 2")


CLIPPED = """() => [...document.querySelectorAll(".plot svg")].flatMap((plot) => {
  const [width, height] = [plot.clientWidth, plot.clientHeight];
  return [...plot.querySelectorAll("text")].filter((text) => {
    const box = text.getBBox();
    return box.x < 0 || box.y < 0 || box.x + box.width > width || box.y + box.height > height;
  }).map((text) => text.textContent);
})"""


def test_no_axis_label_is_clipped(server: PageServer, page: Page) -> None:
    job = several_jobs(server)
    log = log_of(server, job)
    for at in range(1, 40):
        log.append(MetricEvent(step="pretrain", name="train_checkpoint_bytes", value=1.3e12 + 1e6 * at, at=99_000 * at))
        log.append(MetricEvent(step="pretrain", name="train_balance_loss", value=-1.5e-7 * at, at=1_234_567 * at))
    for width in (1440, 700, 390):
        page.set_viewport_size({"width": width, "height": 844})
        page.goto(f"{server.url}/jobs/{job.id}")
        expect(page.locator("[data-curve=train_balance_loss] .mark").first).to_be_visible()
        expect(page.locator("[data-curve=train_memory_bytes] .mark").first).to_have_text(re.compile(r"^1\.\d+ GiB$"))
        assert page.locator(".plot .mark").count() > 50
        assert page.evaluate(CLIPPED) == [], width


TICKS = """async (cases) => {
  const { scaleOf, tickTexts } = await import("/static/format.js");
  return cases.map(([unit, marks]) => {
    const { by, suffix } = scaleOf(unit, marks);
    return tickTexts(marks.map((mark) => Number((mark * by).toPrecision(6))), suffix);
  });
}"""


def test_ticks_carry_units(server: PageServer, page: Page) -> None:
    cases = {
        ("bytes", (1 << 30, 3 << 29)): ["1 GiB", "1.5 GiB"],
        ("bytes", (0, 1 << 29)): ["0 MiB", "512 MiB"],
        ("share", (0, 0.25)): ["0 %", "25 %"],
        ("tokens/s", (5000, 10000)): ["5k", "10k"],
        ("tokens", (0, 1.5e6)): ["0", "1.5M"],
        ("s", (0.5, 1)): ["0.5 s", "1 s"],
        ("s", (0, 0.05)): ["0 ms", "50 ms"],
        ("", (0.0005, 0.0015)): ["0.0005", "0.0015"],
        ("", (0, 0.00015)): ["0", "1.5e-4"],
        ("nats/token", (7.5, 8)): ["7.5", "8"],
        ("reward units", (1, 2)): ["1", "2"],
    }
    assert page.evaluate(TICKS, [list(case) for case in cases]) == list(cases.values())


LAYOUT = """async (graphs) => {
  const { layout } = await import("/static/dag.js");
  const plain = (plan) => ({ ...plan, column: Object.fromEntries(plan.column), row: Object.fromEntries(plan.row),
                             lane: Object.fromEntries(plan.lane) });
  return graphs.map((steps) => plain(layout(steps)));
}"""


def test_steps_and_edges_of_any_recipe_have_places_of_their_own(server: PageServer, page: Page) -> None:
    chance = random.Random(7)
    graphs = []
    for size in range(1, 40):
        inputs = [chance.sample(range(i), min(i, chance.randrange(4))) for i in range(size)]
        graphs.append([{"key": f"s{i}", "inputs": {f"i{j}": f"s{j}" for j in row}} for i, row in enumerate(inputs)])
    for steps, plan in zip(graphs, page.evaluate(LAYOUT, graphs), strict=True):
        column, row, lane = plan["column"], plan["row"], plan["lane"]
        assert len({(column[s["key"]], row[s["key"]]) for s in steps}) == len(steps), "no two steps in one place"
        assert all(column[e["from"]] < column[e["to"]] for e in plan["edges"])
        spans: dict[str, tuple[int, int]] = {}
        for edge in (e for e in plan["edges"] if e["long"]):
            start, end = spans.get(edge["from"], (column[edge["from"]], 0))
            spans[edge["from"]] = (start, max(end, column[edge["to"]]))
        for one, other in itertools.combinations(spans, 2):
            apart = spans[one][1] < spans[other][0] or spans[other][1] < spans[one][0]
            assert apart or lane[one] != lane[other], "a lane carries one step's edges at a time"
    loop = [{"key": "a", "inputs": {"x": "b"}}, {"key": "b", "inputs": {"x": "a"}}, {"key": "c", "inputs": {"x": "c"}}]
    assert page.evaluate(LAYOUT, [loop])[0]["columns"] >= 1, "what no recipe should have hangs nothing"


def test_stopping_asks_first(server: PageServer, page: Page) -> None:
    job = server.submit("mine")
    page.goto(f"{server.url}/jobs/{job.id}")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Keep the job").click()
    assert server.controller.jobs.get(job.id).state == "queued"
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Stop the job").click()
    expect(page.locator(".run-head")).to_contain_text("cancelled")
    expect(page.locator(".run-head")).to_contain_text("stopped before it started")
    assert server.controller.jobs.get(job.id).state == "cancelled"


def test_an_earlier_attempt_can_be_looked_at(server: PageServer, page: Page) -> None:
    job = server.submit()
    log = server.start(job)
    log.append(step("corpus", "started"))
    server.controller.jobs.move_attempt(f"{job.id}.1", "lost", "its driver is gone")
    up_to_pretrain(server.start(job))
    page.goto(f"{server.url}/jobs/{job.id}")
    expect(page.get_by_role("button", name="corpus: reused")).to_be_visible()
    page.get_by_label("Attempt").select_option("1: lost")
    expect(page.get_by_role("button", name="corpus: lost")).to_be_visible()
    expect(page.locator(".run-head")).to_contain_text("its driver is gone")


def test_schedules_are_shown_paused_and_resumed(server: PageServer, page: Page) -> None:
    add_schedules(server)
    page.get_by_role("link", name="Schedules", exact=True).first.click()
    nightly = page.get_by_role("region", name="nightly")
    expect(nightly).to_contain_text("At 02:00 every day, Asia/Singapore time")
    expect(nightly.get_by_role("row")).to_have_count(6)
    expect(nightly.get_by_role("row").nth(1)).to_contain_text("02:00")
    expect(nightly.get_by_role("row").nth(1)).to_contain_text("19:00")  # in Berlin, in winter
    expect(nightly).to_contain_text("A tick is skipped while an earlier job is unfinished.")
    expect(nightly).to_contain_text("skipped")
    nightly.get_by_role("button", name="Pause").click()
    expect(nightly).to_contain_text("Ticks are skipped until you resume the schedule")
    assert server.controller.schedules.get("nightly").paused
    nightly.get_by_role("button", name="Resume").click()
    expect(nightly.get_by_role("button", name="Pause")).to_be_visible()


@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a replica did a while ago counts as what it does now, however slow the browser is."""
    monkeypatch.setattr(serving_reports, "_NOW_SECONDS", 3600.0)


def test_no_deployments_says_how_to_start_one(server: PageServer, page: Page) -> None:
    expect(page.get_by_role("region", name="Deployments")).to_have_count(0)
    page.get_by_role("link", name="Deployments").click()
    expect(page).to_have_url(f"{server.url}/deployments")
    expect(page.get_by_role("link", name="Deployments")).to_have_attribute("aria-current", "page")
    expect(page.get_by_text("moray deploy quickstart")).to_be_visible()
    add_deployment(server, "quickstart")
    expect(page.get_by_role("row", name="quickstart")).to_contain_text("pending")


@pytest.mark.usefixtures("lasting")
def test_deployments_are_listed_with_the_reasons_for_their_states(server: PageServer, page: Page) -> None:
    several_deployments(server)
    card = page.get_by_role("region", name="Deployments")
    expect(card.get_by_role("listitem")).to_have_count(4)  # the stopped one is not there
    expect(card).to_contain_text("FileNotFoundError: config.json is missing")
    expect(card).to_contain_text("497 tokens/s")
    page.get_by_role("link", name="Deployments").click()
    rows = page.get_by_role("row")
    expect(rows).to_have_count(6)
    first = page.get_by_role("row", name="quickstart")
    for text in ("quickstart@newest", "running", "1 of 1..3", "local", "1,315", "497", "24 ms"):
        expect(first).to_contain_text(text)
    expect(first.get_by_role("cell").nth(2)).to_have_text("2")
    expect(page.get_by_role("row", name="prose")).to_contain_text("a replica needs 8 CPU")
    expect(page.get_by_role("row", name="letters")).to_contain_text("failed")
    expect(page.get_by_role("row", name="verse")).to_contain_text("1 of 2 replicas run version 2")
    expect(rows.last).to_contain_text("stopped by a user")
    first.get_by_role("link").click()
    expect(page).to_have_url(f"{server.url}/deployments/quickstart")
    expect(page.get_by_role("heading", name="quickstart")).to_be_visible()


POINTS = "[data-curve='%s'] path.curve.nr%d"


@pytest.mark.usefixtures("lasting")
def test_the_curves_of_a_deployment_grow_as_replicas_report(server: PageServer, page: Page) -> None:
    log = several_deployments(server)
    page.goto(f"{server.url}/deployments/quickstart")
    curves = {name: page.locator(f"[data-curve='{name}']") for name in ("Requests", "Throughput", "Sequences")}
    expect(curves["Throughput"]).to_contain_text(re.compile(r"497 tokens/s at \d\d:\d\d:\d\d"))
    expect(curves["Sequences"]).to_contain_text("running 6 waiting 2")
    latency = page.locator("[data-curve='First token']")
    expect(latency).to_contain_text("p50 24 ms p95 38.3 ms")
    expect(page.locator(".heat-card canvas")).to_have_attribute(
        "aria-label", re.compile("2.30 times the mean, layer 1")
    )
    for ended in (125, 140):
        before = page.locator(POINTS % ("Throughput", 0)).get_attribute("d") or ""
        report(log, "quickstart", ended, version=2, first_token=(0.9, 1.25), running=1)
        expect(page.locator(POINTS % ("Throughput", 0))).not_to_have_attribute("d", before)
    expect(curves["Requests"]).to_contain_text(re.compile(r"[1-9.]+ requests/s"))
    expect(curves["Sequences"]).to_contain_text("running 1 waiting 2")
    expect(latency).to_contain_text("p50 0.9 s p95 1.25 s")
    latency.get_by_role("img").focus()
    page.keyboard.press("Home")
    expect(latency).to_contain_text("p50 0.024 s")
    expect(curves["Sequences"]).to_contain_text("running 6 waiting 2")  # all charts share the cursor
    assert page.evaluate(CLIPPED) == []


def test_a_deployment_shows_its_address_replicas_and_versions(
    server: PageServer, page: Page, context: BrowserContext
) -> None:
    several_deployments(server)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
    page.goto(f"{server.url}/deployments/quickstart")
    address = page.get_by_role("region", name="Address")
    expect(address).to_contain_text("http://127.0.0.1:8000/v1")
    address.get_by_role("button", name="Copy").click()
    expect(address.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("curl http://127.0.0.1:8000/v1/completions")
    assert '"model":"quickstart"' in copied
    replicas = page.get_by_role("region", name="Replicas")
    expect(replicas).to_contain_text("1 of 1..3 ready")
    expect(replicas.get_by_role("listitem").first).to_contain_text("10.0.0.5")
    expect(replicas.get_by_role("listitem").last).to_contain_text("not placed yet")
    versions = page.get_by_role("region", name="Versions").get_by_role("listitem")
    expect(versions.first).to_contain_text("Version 2 live")
    expect(versions.first).to_contain_text("export/7d20ee41")
    expect(versions.first).to_contain_text("115 requests, none failed")
    expect(versions.last).to_contain_text("Version 1 replaced")
    expect(versions.last).to_contain_text("1,200 requests, 3 failed")
    history = page.get_by_role("region", name="History").get_by_role("listitem")
    expect(history.first).to_contain_text("Version 1 replaced")
    add_deployment(server, "quickstart", reference="export/00aa11bb")
    expect(versions.first).to_contain_text("Version 3 starting")
    expect(history.first).to_contain_text("Version 3 starting")
    page.goto(f"{server.url}/deployments/letters")
    expect(page.locator(".problem")).to_have_text("FileNotFoundError: config.json is missing")


def test_stopping_a_deployment_asks_first(server: PageServer, page: Page) -> None:
    several_deployments(server)
    page.goto(f"{server.url}/deployments/quickstart")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Keep it running").click()
    assert server.controller.deployments.get("quickstart").wanted == "running"
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Stop the deployment").click()
    expect(page.get_by_role("button", name="Stopping…")).to_be_disabled()
    expect(page.locator(".deployment-head")).to_contain_text("stopped by a user")
    assert server.controller.deployments.get("quickstart").wanted == "stopped"
    server.controller.deployments.move("quickstart", "stopped", "stopped by a user")
    expect(page.get_by_text("moray deploy quickstart@newest --name quickstart")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_hidden()


def test_rolling_a_deployment_back_asks_first(server: PageServer, page: Page) -> None:
    several_deployments(server)
    page.goto(f"{server.url}/deployments/letters")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Roll back")).to_have_count(0)  # it has no other version
    page.goto(f"{server.url}/deployments/quickstart")
    page.get_by_role("button", name="Roll back").click()
    page.get_by_role("button", name="Keep it as it is").click()
    assert server.controller.deployments.get("quickstart").starting is None
    page.get_by_role("button", name="Roll back").click()
    page.get_by_role("button", name="Back to version 1").click()
    versions = page.get_by_role("region", name="Versions").get_by_role("listitem")
    expect(versions.first).to_contain_text("rolled back by a user")
    expect(versions.last).to_contain_text("Version 1 starting")
    page.get_by_role("button", name="Roll back").click()  # version 2 still answers: it can be taken back
    page.get_by_role("button", name="Back to version 2").click()
    expect(versions.last).to_contain_text("Version 1 replaced")
    expect(versions.first).not_to_contain_text("rolled back by a user")


@pytest.fixture
def model() -> Iterator[Model]:
    with model_server() as running:
        yield running


def test_a_deployed_model_can_be_tried(server: PageServer, page: Page, model: Model) -> None:
    several_deployments(server, model.port)
    page.goto(f"{server.url}/deployments/quickstart")
    box = page.get_by_role("region", name="Try it")
    box.get_by_label("Prompt").fill("one <b>two</b> wait three")
    box.get_by_label("Max tokens").fill("7")
    box.get_by_label("Temperature").fill("0.5")
    box.get_by_role("button", name="Send").click()
    answer = box.get_by_role("log")
    expect(answer).to_have_text("one <b>two</b>")  # while the rest is generated
    expect(box.get_by_role("button", name="Stop")).to_be_visible()
    model.release.set()
    expect(answer).to_have_text("one <b>two</b> wait three")
    expect(box.get_by_role("status")).to_contain_text(
        re.compile(r"first token after [\d.]+ m?s · 4 tokens · [\d,.]+ tokens/s · reached max tokens")
    )
    expect(box.get_by_role("button", name="Send")).to_be_visible()
    sent = {"model": "quickstart", "prompt": "one <b>two</b> wait three", "max_tokens": 7, "temperature": 0.5}
    assert model.bodies[0].items() >= (sent | {"stream": True}).items()


def test_a_trial_can_be_stopped(server: PageServer, page: Page, model: Model) -> None:
    several_deployments(server, model.port)
    page.goto(f"{server.url}/deployments/quickstart")
    box = page.get_by_role("region", name="Try it")
    box.get_by_label("Prompt").fill("one wait two")
    page.keyboard.press("Control+Enter")
    expect(box.get_by_role("log")).to_have_text("one")
    box.get_by_role("button", name="Stop").click()
    expect(box.get_by_role("status")).to_contain_text("stopped")
    expect(box.get_by_role("alert")).to_have_count(0)
    expect(box.get_by_role("button", name="Send")).to_be_visible()


def test_a_trial_that_fails_says_why(server: PageServer, context: BrowserContext, model: Model) -> None:
    several_deployments(server, model.port)
    page = context.new_page()  # its console reports the failed requests
    log_in(page, server)
    page.goto(f"{server.url}/deployments/quickstart")
    box = page.get_by_role("region", name="Try it")
    for prompt, words in (("fail", "prompt: is too sad"), ("a break", "the replica stopped during this response")):
        box.get_by_label("Prompt").fill(prompt)
        box.get_by_role("button", name="Send").click()
        expect(box.get_by_role("alert")).to_have_text(words)
        expect(box.get_by_role("button", name="Send")).to_be_visible()
    page.goto(f"{server.url}/deployments/letters")
    page.get_by_role("button", name="Send").click()
    expect(box.get_by_role("alert")).to_have_text(
        "deployment 'letters' is failed; FileNotFoundError: config.json is missing"
    )


def test_a_deployment_that_does_not_exist(server: PageServer, context: BrowserContext) -> None:
    page = context.new_page()
    log_in(page, server)
    page.goto(f"{server.url}/deployments/nothing")
    expect(page.get_by_role("alert")).to_contain_text("unknown deployment 'nothing'")


def test_text_of_deployments_is_never_markup(server: PageServer, page: Page) -> None:
    add_deployment(server, "mine", model=EVIL, reference=EVIL)
    server.controller.deployments.move_version("mine", 1, "failed", EVIL)
    server.controller.deployments.move("mine", "failed", EVIL)
    see_replicas(server, mine=(ReplicaSeen("one", "starting", EVIL),))
    expect(page.get_by_role("region", name="Deployments")).to_contain_text(EVIL)
    page.get_by_role("link", name="Deployments").click()
    expect(page.get_by_role("row", name="mine")).to_contain_text(EVIL)
    page.get_by_role("link", name="mine").click()
    for part in ("Replicas", "Versions", "History"):
        expect(page.get_by_role("region", name=part)).to_contain_text(EVIL)
    expect(page.locator(".deployment-head .problem")).to_have_text(EVIL)
    assert page.locator("main img").count() == 0
    assert page.title() != "owned"


def test_text_of_users_is_never_markup(server: PageServer, page: Page) -> None:
    job = server.submit(EVIL)
    log = server.start(job)
    log.append(step("corpus", "started", why=EVIL))
    server.print(job, EVIL + "\n")
    expect(page.get_by_role("link", name=EVIL)).to_be_visible()
    page.get_by_role("link", name=EVIL).click()
    expect(page.get_by_role("heading", name=EVIL)).to_be_visible()
    expect(page.locator(".detail")).to_contain_text(EVIL)
    expect(page.get_by_role("log")).to_contain_text(EVIL)
    assert page.locator("main img").count() == 0
    assert page.title() != "owned"


def test_a_job_that_does_not_exist(server: PageServer, context: BrowserContext) -> None:
    page = context.new_page()
    log_in(page, server)
    page.goto(f"{server.url}/jobs/nothing")
    expect(page.get_by_role("alert")).to_contain_text("no job 'nothing'")


def test_the_theme_follows_the_system_until_one_is_chosen(server: PageServer, page: Page) -> None:
    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="light")
    light = background()
    page.emulate_media(color_scheme="dark")
    dark = background()
    assert light != dark
    page.get_by_role("button", name="Theme: system").click()
    assert background() == light
    page.reload()
    assert background() == light, "the choice is remembered"
    page.get_by_role("button", name="Theme: light").click()
    assert background() == dark


def test_a_phone_needs_no_sideways_scroll(server: PageServer, page: Page) -> None:
    job = several_jobs(server)
    add_schedules(server)
    server.submit("x" * 180)
    several_deployments(server)
    add_deployment(server, "y" * 63, model="z" * 200, reference="r" * 200)
    server.controller.deployments.move("y" * 63, "failed", "w" * 400)
    page.set_viewport_size({"width": 390, "height": 844})
    pages = {
        "/": ".rows", f"/jobs/{job.id}": ".plot path", "/schedules": "table", "/deployments": "table",
        "/deployments/quickstart": ".plot path", f"/deployments/{'y' * 63}": ".plot",
    }  # fmt: skip
    for path, shown in pages.items():
        page.goto(server.url + path)
        page.locator(shown).first.wait_for(state="attached")
        expect(page.locator("#live")).to_have_attribute("data-state", "live")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
    page.goto(f"{server.url}/jobs/{job.id}")
    corpus, dedup = (page.get_by_role("button", name=f"{key}: reused").bounding_box() for key in ("corpus", "dedup"))
    assert corpus is not None
    assert dedup is not None
    assert (corpus["x"], corpus["y"] < dedup["y"]) == (dedup["x"], True), "steps go downwards where there is no room"


def test_all_of_it_can_be_reached_by_keys(server: PageServer, page: Page) -> None:
    job = several_jobs(server)
    expect(page.get_by_role("link", name="at-work")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    reach(page, lambda: page.evaluate("document.activeElement.textContent") == "at-work")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{server.url}/jobs/{job.id}")
    expect(page.get_by_role("button", name="dedup: reused")).to_be_visible()
    reach(page, lambda: str(page.evaluate("document.activeElement.title")) == "dedup")
    page.keyboard.press("Space")
    expect(page.locator(".detail h2")).to_have_text("dedup")
    training(log_of(server, job), 50, 60, 200)
    expect(page.locator("[data-curve=train_loss]")).to_contain_text("at step 60")
    assert page.evaluate("document.activeElement.title") == "dedup", "an update takes no focus away"


@pytest.mark.usefixtures("lasting")
def test_a_deployment_can_be_reached_by_keys(server: PageServer, page: Page) -> None:
    log = several_deployments(server)
    expect(page.get_by_role("region", name="Deployments")).to_be_visible()
    reach(page, lambda: page.evaluate("document.activeElement.textContent") == "quickstart")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{server.url}/deployments/quickstart")
    expect(page.get_by_role("button", name="Copy")).to_be_visible()
    reach(page, lambda: page.evaluate("document.activeElement.textContent") == "Copy")
    report(log, "quickstart", 130, version=2, running=3)
    expect(page.locator("[data-curve=Sequences]")).to_contain_text("running 3")
    assert page.evaluate("document.activeElement.textContent") == "Copy", "an update takes no focus away"


def reach(page: Page, there: Callable[[], bool]) -> None:
    for _ in range(60):
        page.keyboard.press("Tab")
        if there():
            return
    raise AssertionError("no number of tabs leads there")


def test_the_page_finds_a_controller_that_was_away(tmp_path: Path, context: BrowserContext) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = context.new_page()
    with page_server(tmp_path, port) as server:
        log_in(page, server)
    expect(page.locator("#live")).to_have_attribute("data-state", "lost")
    with page_server(tmp_path, port) as server:
        server.submit("after")
        expect(page.locator("#live")).to_have_attribute("data-state", "live", timeout=30_000)
        expect(page.get_by_role("link", name="after")).to_be_visible()
