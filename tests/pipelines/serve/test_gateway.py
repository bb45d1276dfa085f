"""The gateway around an application that behaves as Serve's proxy does, over real HTTP."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests

from moray.pipelines.serve import gateway
from moray.pipelines.serve.api_error import FULL, ApiError
from moray.pipelines.serve.gateway import VERSION, Gateway
from moray.pipelines.serve.request_body import LIMIT, MOST, BodyMemory
from tests.checkout import ROOT
from tests.loopback import serve_app

JSON = (b"content-type", b"application/json")
SSE = (b"content-type", b"text/event-stream")


class Proxy:
    """Serve's proxy with the deployments `names`. The next entry of `script` answers a request, or else an echo."""

    def __init__(self) -> None:
        self.names = ["one", "two"]
        self.others = {"/chat": "somebody's"}
        self.starting = 0  # requests for routes that are answered by 503
        self.limit = 0  # of a body for the model `one`, if set
        self.script: list[str] = []
        self.calls: list[tuple[str, bytes]] = []
        self.headers: dict[bytes, bytes] = {}
        self.gone = Counter()
        self.let_go = threading.Event()

    async def __call__(self, scope, receive, send) -> None:
        path = scope["path"]
        if path == "/-/routes" and self.starting:
            self.starting -= 1
            await self.answer(send, 503, b"no route table yet")
            return
        if path == "/-/routes":
            body = json.dumps({f"/{name}": f"moray-{name}" for name in self.names} | self.others)
            await self.answer(send, 200, body.encode(), JSON)
            return
        self.headers = dict(scope["headers"])
        scope["path"] = "/" + path.split("/", 2)[-1]  # Serve changes the scope that it is given
        scope["headers"].append((b"x-request-id", b"5"))
        message = await receive()
        self.calls.append((path, message.get("body", b"")))
        act = self.script.pop(0) if self.script else "echo"
        await getattr(self, act)(path, receive, send)

    async def answer(self, send, status, body, *headers, more=False) -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def echo(self, path, receive, send) -> None:
        if "/v1/models/" in path:
            limit = {LIMIT: self.limit if path.startswith("/one/") else 5} if self.limit else {}
            await self.answer(
                send, 200, json.dumps({"id": path.split("/")[1], **limit}).encode(), JSON, (VERSION, b"1")
            )
            return
        await self.answer(send, 200, json.dumps({"path": path}).encode(), JSON, (VERSION, b"1"))

    async def died(self, path, receive, send) -> None:
        """Serve sends nothing if an actor died before the response began."""

    async def unavailable(self, path, receive, send) -> None:
        await self.answer(send, 503, b"no replicas", (b"content-type", b"text/plain"))

    async def not_found(self, path, receive, send) -> None:
        await self.answer(send, 404, b"", (b"content-type", b"text/plain"))

    async def own_error(self, path, receive, send) -> None:
        await self.answer(send, 500, b'{"error": {}}', JSON, (VERSION, b"1"))

    async def needs_key(self, path, receive, send) -> None:
        body = ApiError(401, "this server needs a key", code="no_api_key").body()
        await self.answer(send, 401, json.dumps(body).encode(), JSON, (VERSION, b"1"))

    async def stream(self, path, receive, send) -> None:
        await self.answer(send, 200, b"data: 1\n\n", SSE, (VERSION, b"1"), more=True)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def cut_stream(self, path, receive, send) -> None:
        await self.answer(send, 200, b'data: {"choices": []}\n\n', SSE, (VERSION, b"1"), more=True)

    async def started_only(self, path, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [SSE, (VERSION, b"1")]})

    async def cut_whole(self, path, receive, send) -> None:
        await self.answer(send, 200, b'{"half', JSON, (VERSION, b"1"), (b"content-length", b"99"), more=True)

    async def hangs(self, path, receive, send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone[path] += 1

    async def full(self, path, receive, send) -> None:
        await self.answer(send, 429, b"{}", JSON, (VERSION, b"1"), (FULL.encode(), b"1"))

    async def holds(self, path, receive, send) -> None:
        while not self.let_go.is_set():
            await asyncio.sleep(0.001)
        await self.echo(path, receive, send)


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


@pytest.fixture
def url(proxy: Proxy) -> Iterator[str]:
    with serve_app(Gateway(proxy), lifespan="off", log_level="critical") as served:
        yield served


def ask(url: str, path: str = "/v1/completions", **body: object) -> requests.Response:
    return requests.post(url + path, json=body, timeout=40)


def test_a_request_goes_to_the_deployment_of_its_model(proxy: Proxy, url: str) -> None:
    assert ask(url, model="two").json() == {"path": "/two/v1/completions"}
    assert ask(url, "/one/v1/completions", model="two").json() == {"path": "/one/v1/completions"}
    assert requests.get(f"{url}/v1/models/one").json() == {"id": "one"}
    assert requests.get(f"{url}/two/docs").json() == {"path": "/two/docs"}
    assert proxy.calls[0] == ("/two/v1/completions", b'{"model": "two"}')


def test_applications_of_others_are_left_alone(proxy: Proxy, url: str) -> None:
    proxy.script = ["unavailable"]
    response = ask(url, "/chat/x", model="one")
    assert (response.status_code, response.text) == (503, "no replicas")
    assert [path for path, _ in proxy.calls] == ["/chat/x"]


def test_the_only_deployment_needs_no_name(proxy: Proxy, url: str) -> None:
    proxy.names = ["one"]
    for body in ({"model": "default"}, {}, {"model": None}):
        assert ask(url, **body).json() == {"path": "/one/v1/completions"}
    assert requests.get(f"{url}/docs").json() == {"path": "/one/docs"}
    assert requests.post(f"{url}/v1/completions", data=b"{not json").json() == {"path": "/one/v1/completions"}


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", {"model": "tow"}, 404, "the model 'tow' does not exist; deployed: one, two"),
        ("/v1/completions", {"model": "x" * 9999}, 404, "does not exist"),
        ("/v1/completions", {"prompt": "no model"}, 400, "model: name one of one, two"),
        ("/v1/completions", {"model": 7}, 400, "the body must be a JSON object, and `model` a string"),
        ("/v1/models", {}, 405, "only GET is possible"),
        ("/somewhere", {}, 404, "/somewhere does not exist; deployed models: one, two"),
    ],
)
def test_a_request_for_no_deployment_is_one_error(url: str, path: str, body: dict, status: int, said: str) -> None:
    response = ask(url, path, **body)
    assert response.status_code == status
    assert said in response.json()["error"]["message"]
    assert len(response.content) < 1000


def test_models_are_listed_as_their_replicas_describe_them(proxy: Proxy, url: str) -> None:
    assert requests.get(f"{url}/health").json() == {"status": "ok", "models": ["one", "two"]}
    assert [card["id"] for card in requests.get(f"{url}/v1/models").json()["data"]] == ["one", "two"]
    proxy.script = ["hangs", "unavailable"]  # listed by their names
    assert [card["id"] for card in requests.get(f"{url}/v1/models").json()["data"]] == ["one", "two"]


def test_a_proxy_that_has_just_started_waits_for_its_routes(
    proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.starting = 3
    assert ask(url, model="one").json() == {"path": "/one/v1/completions"}
    monkeypatch.setattr("moray.pipelines.serve.gateway._RETRY_SECONDS", 0.3)
    proxy.starting = 10**6
    assert ask(url, model="one").status_code == 503


def test_nothing_deployed_is_a_503_that_says_when_to_come_back(proxy: Proxy, url: str) -> None:
    proxy.names = []
    response = ask(url, model="one")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("lost", ["died", "unavailable", "not_found", "started_only"])
def test_a_replica_that_dies_before_the_first_byte_is_replaced_by_another(proxy: Proxy, url: str, lost: str) -> None:
    proxy.script = [lost, lost, "stream"]
    response = ask(url, model="one", prompt="the same")
    assert response.text == "data: 1\n\ndata: [DONE]\n\n"
    assert proxy.calls == [("/one/v1/completions", b'{"model": "one", "prompt": "the same"}')] * 3


def test_an_error_of_the_model_is_not_asked_again(proxy: Proxy, url: str) -> None:
    proxy.script = ["own_error"]
    assert ask(url, model="one").status_code == 500
    assert len(proxy.calls) == 1


def test_no_replica_in_time_is_a_503(proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moray.pipelines.serve.gateway._RETRY_SECONDS", 0.5)
    proxy.script = ["died"] * 20
    response = ask(url, model="one")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["type"] == "server_error"


def test_a_stream_that_is_cut_ends_with_an_error_event(proxy: Proxy, url: str) -> None:
    proxy.script = ["cut_stream"]
    last = ask(url, model="one").text.strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    proxy.script = ["cut_stream"]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="the replica stopped"):
        list(client.completions.create(model="one", prompt="", stream=True))


def test_a_request_that_kills_replicas_does_not_kill_them_all(proxy: Proxy, url: str) -> None:
    proxy.script = ["died"] * 20
    response = ask(url, model="one")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_lost")
    assert len(proxy.calls) == 3


def test_other_applications_keep_their_paths(proxy: Proxy, url: str) -> None:
    """Paths belong to the longest prefix, as in Serve."""
    proxy.others = {"/": "site", "/chat/v2": "theirs"}
    for path in ("/predict", "/chat/v2/x", "/chat", "/docs"):
        assert ask(url, path).json()["path"] == path
    assert ask(url, model="one").json()["path"] == "/one/v1/completions"
    assert requests.get(f"{url}/health", timeout=10).json()["models"] == ["one", "two"]
    proxy.names = []
    assert ask(url, model="one").json()["path"] == "/v1/completions"


def test_half_an_answer_is_not_a_whole_one(proxy: Proxy, url: str) -> None:
    proxy.script = ["cut_whole"]
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        ask(url, model="one")


def test_a_client_that_leaves_is_noticed(proxy: Proxy, url: str) -> None:
    proxy.script = ["hangs"]
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(f"{url}/v1/completions", json={"model": "one"}, timeout=0.3)
    ask(url, model="two")
    while not proxy.gone:
        assert ask(url, model="two").status_code == 200
    assert proxy.gone == {"/one/v1/completions": 1}


@pytest.mark.parametrize(("megabytes", "status"), [(1, 200), (3, 200), (4, 413), (30, 413)])
def test_a_body_may_be_what_the_largest_model_accepts(proxy: Proxy, url: str, megabytes: int, status: int) -> None:
    proxy.limit = 3 << 20
    part = b"x" * (1 << 20)
    response = requests.post(f"{url}/one/v1/completions", data=(part for _ in range(megabytes)), timeout=60)
    assert response.status_code == status
    assert max((len(body) for _, body in proxy.calls), default=0) <= 3 << 20


def test_models_that_do_not_tell_accept_what_the_gateway_does(proxy: Proxy, url: str) -> None:
    assert requests.post(f"{url}/one/v1/completions", data=b"x" * (2 << 20), timeout=60).status_code == 200
    assert requests.post(f"{url}/one/v1/completions", data=b"x" * (MOST + 1), timeout=60).status_code == 413


def test_a_proxy_holds_only_so_many_bytes_of_bodies() -> None:
    memory, small = BodyMemory(10), 64 << 10
    with memory.hold() as take:
        take(small)
        assert memory.used == 0
        take(6)
        with memory.hold() as other:
            other(small - 1)
            other(4)
            with pytest.raises(ApiError, match="too many large requests"):
                other(2)
            with memory.hold() as third:
                third(small)  # small bodies are always held
        assert memory.used == 6
    assert memory.used == 0


def test_a_body_that_does_not_come_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named after a breaker's finding: 272 connections that sent half a body shut everybody else out."""
    from moray.pipelines.serve import request_body

    async def limit() -> int:
        return 1 << 20

    async def half() -> dict:
        if sent:
            await asyncio.get_running_loop().create_future()
        sent.append(1)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def drips() -> dict:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"", "more_body": True}

    monkeypatch.setattr(request_body, "_SILENT_SECONDS", 0.01)
    monkeypatch.setattr(request_body, "_WHOLE_SECONDS", 0.05)
    for receive in (half, drips):
        sent: list[int] = []
        memory = BodyMemory(10)
        with pytest.raises(ApiError, match="did not arrive in time") as raised, memory.hold() as take:
            asyncio.run(request_body.read_body(receive, limit, take))
        assert raised.value.status == 408


def test_clients_cannot_order_ray_serve(proxy: Proxy, url: str) -> None:
    """Named after a breaker's finding: with this header the gateway ran one request again and again for 20 s."""
    headers = {"x-request-timeout-seconds": "0.5", "x-serve-router-x": "1", "serve_multiplexed_model_id": "a"}
    headers |= {"X-Request-Disconnect-Disabled": "1", "x-request-id": "kept"}
    requests.post(f"{url}/v1/completions", json={"model": "one"}, headers=headers, timeout=20)
    assert {name for name in proxy.headers if name.startswith((b"x-", b"serve"))} == {b"x-request-id"}
    requests.post(f"{url}/v1/completions", json={"model": "one"}, headers={"x-request-id": "\xff"}, timeout=20)
    assert b"x-request-id" not in proxy.headers


def test_a_target_that_is_no_path(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        client.settimeout(20)
        assert client.recv(100).startswith(b"HTTP/1.1 404")


def test_there_are_no_websockets(proxy: Proxy, url: str) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    response = requests.get(f"{url}/v1/completions", headers=upgrade, timeout=20)
    assert response.status_code in (403, 404)
    assert proxy.calls in ([], [("/one/v1/completions", b"")]) or response.status_code == 403


def test_a_proxy_loads_nothing_heavy() -> None:
    code = (
        "import sys, moray.pipelines.serve.gateway\n"
        "print([name for name in ('torch', 'ray', 'fastapi', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_nobody_without_a_key_sends_a_large_body(proxy: Proxy, url: str) -> None:
    proxy.script = ["needs_key", "needs_key"]
    response = requests.post(f"{url}/v1/completions", data=b"x" * (2 << 20), timeout=20)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "no_api_key")
    assert [path for path, _ in proxy.calls] == ["/one/v1/models/one", "/two/v1/models/two"]
    proxy.script = ["needs_key", "needs_key"]
    assert requests.get(f"{url}/v1/models", timeout=20).headers["www-authenticate"] == "Bearer"


def test_ready_names_the_models_that_do_not_answer(proxy: Proxy, url: str) -> None:
    assert requests.get(f"{url}/ready", timeout=20).json()["status"] == "ok"
    proxy.script = ["echo", "unavailable"]
    response = requests.get(f"{url}/ready", timeout=20)
    assert (response.status_code, response.json()["missing"]) == (503, ["two"])


def test_metrics_without_any_replica_are_empty(proxy: Proxy, url: str) -> None:
    response = requests.get(f"{url}/metrics", timeout=20)
    assert (response.status_code, response.text) == (200, "")
    import ray

    assert not ray.is_initialized()  # Ray starts a cluster when it is asked for an actor
    assert requests.post(f"{url}/metrics", timeout=20).status_code == 405


def test_the_chat_page_is_small_and_needs_nothing_from_elsewhere(proxy: Proxy, url: str) -> None:
    page = requests.get(f"{url}/", timeout=20)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    parts = [requests.get(f"{url}{path}", timeout=20) for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.text)]
    assert [part.status_code for part in parts] == [200, 200]
    text = page.text + "".join(part.text for part in parts)
    assert len(text.encode()) < 60_000
    assert "http" not in text.replace("https://huggingface", "")
    assert proxy.calls == []


def test_metrics_are_for_nobody_while_no_replica_has_seen_the_key(proxy: Proxy, url: str, monkeypatch) -> None:
    monkeypatch.setattr(gateway, "_CARD_SECONDS", 0.05)
    proxy.script = ["hangs", "hangs"]
    assert requests.get(f"{url}/metrics", timeout=9).status_code == 503


def test_other_requests_take_no_place_in_a_queue(proxy: Proxy, url: str) -> None:
    proxy.script = ["holds", "full"]
    with ThreadPoolExecutor(1) as pool:
        open_one = pool.submit(ask, url, model="one")
        while not proxy.calls:
            pass
        assert [ask(url, model="one").status_code for _ in range(2)] == [429, 429]
        assert requests.get(f"{url}/one/health", timeout=9).status_code == 200
        assert ask(url, "/one/tokenize").status_code == 200
        proxy.let_go.set()
        assert open_one.result().status_code == 200


def test_what_a_replica_would_refuse_is_refused_in_the_proxy(proxy: Proxy, url: str) -> None:
    """Other clients' requests still reach the replicas, and so do this one's when it has fewer open."""
    proxy.script = ["holds", "full"]
    with ThreadPoolExecutor(1) as pool:
        open_one = pool.submit(ask, url, model="one")
        while not proxy.calls:
            pass
        assert ask(url, model="one").status_code == 429
        refused = ask(url, model="one")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert (refused.headers["retry-after"], len(proxy.calls)) == ("1", 2)
        assert ask(url, model="two").status_code == 200
        with_key = requests.post(f"{url}/one/v1/completions", json={}, headers={"Authorization": "Bearer k"}, timeout=9)
        assert with_key.status_code == 200
        proxy.let_go.set()
        assert open_one.result().status_code == 200
    assert ask(url, model="one").status_code == 200
