"""The chat page, which the gateway serves at `/`. Its files are small and need nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).with_name("page")
PAGE = {
    "/": ("index.html", b"text/html; charset=utf-8"),
    "/chat.css": ("chat.css", b"text/css; charset=utf-8"),
    "/chat.js": ("chat.js", b"text/javascript; charset=utf-8"),
}  # file and content type by path
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@cache
def chat_page_file(path: str) -> tuple[bytes, bytes]:
    """Content and content type of one of the paths of `PAGE`."""
    name, kind = PAGE[path]
    return (_FOLDER / name).read_bytes(), kind
