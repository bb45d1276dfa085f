"""A shared root on a server that is not S3: always one readable error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moray.platform.core.errors import InputError
from moray.platform.store.manifest import DamagedError
from moray.platform.store.remote import RemoteArtifacts


def refusal(code: str) -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>words</Message></Error>'.encode()


class Answering(BaseHTTPRequestHandler):
    """Says the same to every request."""

    protocol_version = "HTTP/1.1"
    status, body, location = 200, b"", ""
    well = 0  # so many requests are answered as S3 does

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if type(self).well:
            type(self).well -= 1
            listing = b"<ListBucketResult><Name>bucket</Name><KeyCount>0</KeyCount></ListBucketResult>"
            self.send_response(200)
            self.send_header("content-length", str(len(listing)))
            self.end_headers()
            self.wfile.write(listing)
            return
        self.send_response(self.status)
        self.send_header("content-length", str(len(self.body)))
        if self.location:
            self.send_header("location", self.location)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answering]]:
    kind = type("Answer", (Answering,), {})
    serving = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True)  # seconds to see a shutdown
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{serving.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield kind
    serving.shutdown()
    serving.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("status", "body", "location", "words"),
    [
        (200, b"<html><body>please log in</body></html>", "", "not from an S3 server"),
        (200, b"", "", "not from an S3 server"),
        (301, b"", "", "redirects"),
        (302, b"", "https://login.example/", "redirects"),
        (301, refusal("PermanentRedirect"), "", "another region|redirects"),
        (403, refusal("RequestTimeTooSkewed"), "", "clock of this machine"),
        (403, refusal("AccountProblem"), "", "account .* disabled"),
        (403, refusal("AccessDenied"), "", "access denied"),
        (404, b"<html>", "", "HTTP 404"),
    ],
)
def test_a_server_that_is_not_s3_is_a_readable_error(
    server: type[Answering], status: int, body: bytes, location: str, words: str
) -> None:
    server.status, server.body, server.location = status, body, location
    root = RemoteArtifacts("s3://bucket/prefix")
    for use in (root.check_writable, root.steps, root.aliases, lambda: root.get("step", "ab" * 16)):
        with pytest.raises(InputError, match=words):
            use()


@pytest.mark.parametrize("body", [b"<html><body>please log in</body></html>", b""])
def test_a_server_that_becomes_something_else_is_no_empty_bucket(server: type[Answering], body: bytes) -> None:
    server.well, server.body = 1, body
    root = RemoteArtifacts("s3://bucket/prefix")
    with pytest.raises(InputError, match="not from an S3 server"):
        root.steps()
    with pytest.raises(DamagedError) as caught:
        root.get("step", "ab" * 16)
    assert "moray artifacts rm" not in caught.value.hint
