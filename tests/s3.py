"""A real S3 server on loopback (moto's, in a process of its own) and a proxy that spoils requests as a test wants."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3.session

from moray.platform.core.ports import free_port

BUCKET = "moray-test"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class Request:
    """What a client asked for; `key` is the object's."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def key(self) -> str:
        return self.path.partition("?")[0].removeprefix(f"/{BUCKET}/")


# Answers "pass", "drop" (the connection, before the server hears of it), "mute" (the server acts, its answer is lost),
# "half" (the answer breaks off in its body), or a status and a body of its own. It may change the headers.
Fault = Callable[[Request], str | tuple[int, str]]


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a server that lasts as long as the block, with one empty bucket."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for_port(port, process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def empty_bucket(url: str) -> Any:
    """A client of a server, in which the test's bucket is, and nothing in it."""
    names = (KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"])
    client = boto3.session.Session(*names, region_name="us-east-1").client("s3", endpoint_url=url)
    client.create_bucket(Bucket=BUCKET)
    for key in keys(client):
        client.delete_object(Bucket=BUCKET, Key=key)
    return client


def keys(client: Any, prefix: str = "") -> list[str]:
    return [item["Key"] for item in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the S3 server does not listen")


@contextmanager
def faulty_proxy(server: str, fault: Fault, listen: str = "127.0.0.1") -> Iterator[str]:
    """The URL of a proxy before `server`, at the address `listen`, that asks `fault` about each request."""
    host = server.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Request(self.command, self.path, dict(self.headers))
            verdict = fault(request)
            if verdict == "drop":
                self.hang_up()
            elif isinstance(verdict, tuple):
                self.answer(verdict[0], {"Content-Type": "application/xml"}, verdict[1].encode())
            else:
                upstream = http.client.HTTPConnection(host, timeout=60)
                upstream.request(self.command, self.path, body, request.headers)
                answer = upstream.getresponse()
                data, headers = answer.read(), dict(answer.getheaders())
                upstream.close()
                if verdict == "mute":
                    self.hang_up()
                else:
                    self.answer(answer.status, headers, data, cut=verdict == "half")

        def answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else b"" if self.command == "HEAD" else data)
            if cut:
                self.hang_up()

        def hang_up(self) -> None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: a test says what it saw."""

    for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.relay)
    proxy = ThreadingHTTPServer((listen, 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.01,), name="faulty proxy", daemon=True)
    thread.start()
    try:
        yield f"http://{listen}:{proxy.server_address[1]}"
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
