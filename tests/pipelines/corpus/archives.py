"""WARC files made by hand, so that what is wrong with one can be chosen."""

from __future__ import annotations

import gzip
from collections.abc import Iterable


def record(kind: str, body: bytes, number: int = 0, content_type: str = "", length: int | None = None) -> bytes:
    """One record of WARC/1.0."""
    headers = {
        "WARC-Type": kind,
        "WARC-Record-ID": f"<urn:uuid:{number}>",
        "WARC-Date": "2024-01-02T03:04:05Z",
        "WARC-Target-URI": f"http://site.example/{number}",
        "Content-Type": content_type,
        "Content-Length": str(len(body) if length is None else length),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value)
    return b"WARC/1.0\r\n" + head.encode() + b"\r\n" + body + b"\r\n\r\n"


def response(
    body: bytes, number: int = 0, kind: str = "text/html; charset=utf-8", status: str = "200 OK", more: str = ""
) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}\r\n".encode()
    return record("response", head + body, number, "application/http; msgtype=response")


def zipped(records: Iterable[bytes]) -> bytes:
    """A member of gzip for each record, as crawlers write them."""
    return b"".join(gzip.compress(item) for item in records)


PAGE = """<!doctype html><html><head><title>A page</title><script>var hidden = 1;</script></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About us</a></li><li><a href="/more">More</a></li></ul></nav>
<main><article><h1>On {name}</h1>
<p>The first paragraph of the text is long enough to be told from a menu, and it says what {name} is about.</p>
<p>The second paragraph goes on, with a further sentence, so that there are words to be found in it as well.</p>
</article></main>
<footer><a href="/imprint">Imprint</a> <a href="/cookies">Cookie settings</a></footer></body></html>"""
