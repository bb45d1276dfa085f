"""The chat page in a real browser, against a gateway and a model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from moray.pipelines.serve.async_engine import AsyncEngine
from moray.pipelines.serve.gateway import Gateway
from moray.pipelines.serve.key_check import KeyCheck
from moray.pipelines.serve.openai_api import build_serving_app
from moray.platform.core.api_keys import ApiKey, hash_key
from moray.platform.core.serving import key_settings
from tests.loopback import serve_app
from tests.pipelines.serve.chats import PLAIN, REASONING, chat_engine, chat_form, chat_vocabulary

pytestmark = pytest.mark.browser
KEY = "mk-secret"


class Routed:
    """The models of a proxy, each below its name."""

    def __init__(self, apps) -> None:
        self.apps = apps

    async def __call__(self, scope, receive, send) -> None:
        name = scope["path"].split("/")[1]
        if scope["type"] == "lifespan":
            return
        if scope["path"] == "/-/routes":
            body = json.dumps({f"/{one}": f"moray-{one}" for one in self.apps}).encode()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})
            return
        await self.apps[name]({**scope, "root_path": f"/{name}"}, receive, send)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    vocabulary, keys = chat_vocabulary(ends=()), KeyCheck(required=True)  # answers end at their limits only
    keys.update(key_settings([ApiKey(name="page", sha256=hash_key(KEY))])["keys"])
    engines = {name: AsyncEngine(chat_engine(vocabulary, 16_384)) for name in ("plain", "thinker", "mute")}
    templates = {"plain": PLAIN, "thinker": REASONING, "mute": None}
    apps = {
        name: build_serving_app(engine, name, "1", chat=chat_form(vocabulary, templates[name]), keys=keys)
        for name, engine in engines.items()
    }
    for engine in engines.values():
        engine.start()
    with serve_app(Gateway(Routed(apps)), lifespan="off") as served:
        yield served
    for engine in engines.values():
        engine.stop()


@pytest.fixture
def page(url: str) -> Iterator[Page]:
    """A page with a key. In the end it may have asked nobody else, and nothing may have failed in it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        text = "no Chromium on the path: apt-get install chromium"
        pytest.fail(text) if "CI" in os.environ else pytest.skip(text)
    asked: list[str] = []
    said: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page()
        opened.set_default_timeout(20_000)
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.goto(url)
        expect(opened.get_by_role("alert")).to_contain_text("needs a key")
        opened.get_by_label("Key").fill(KEY)
        opened.get_by_label("Key").press("Tab")
        expect(opened.get_by_label("Model")).to_have_value("mute")
        opened.get_by_role("button", name="Options").click()
        yield opened
        browser.close()
    assert not said
    assert all(one.startswith((url, "data:", "blob:")) for one in asked)


def ask(page: Page, model: str, text: str) -> None:
    page.get_by_label("Model").select_option(model)
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def limit(page: Page, tokens: int) -> None:
    page.get_by_role("button", name="Options").click()
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_role("button", name="Options").click()


def test_an_answer_comes_and_the_conversation_stays(page: Page) -> None:
    limit(page, 12)
    ask(page, "plain", "In the beginning <b>was</b>")
    expect(page.locator(".assistant .foot")).to_contain_text("12 tokens")
    expect(page.locator("#notice")).to_contain_text("base model")
    expect(page.locator(".user > .text")).to_have_text("In the beginning <b>was</b>")
    page.reload()
    expect(page.locator(".user > .text")).to_have_text("In the beginning <b>was</b>")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".message")).to_have_count(2)
    expect(page.locator(".assistant .foot")).to_contain_text("12 tokens")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)


def test_a_long_answer_is_stopped(page: Page) -> None:
    ask(page, "plain", "In the beginning")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".assistant .foot")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_reasoning_is_folded(page: Page) -> None:
    limit(page, 30)
    ask(page, "thinker", "In the beginning")
    expect(page.locator(".assistant summary")).to_have_text("Reasoning")
    expect(page.locator("#notice")).to_be_hidden()


def test_what_the_server_refuses_is_told(page: Page) -> None:
    ask(page, "mute", "In the beginning")
    expect(page.get_by_role("alert")).to_contain_text("moray models template")
    expect(page.locator(".message")).to_have_count(1)  # the question can be asked again
