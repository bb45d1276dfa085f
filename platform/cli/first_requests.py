"""How to try a model that has just been served."""

from __future__ import annotations

from moray.platform.core.api_keys import served_keys
from moray.platform.core.home import Home
from moray.platform.run.console import err


def show_first_requests(url: str, model: str) -> None:
    """Prints a request and other ways to talk to a model. url: of its API, with /v1."""
    keyed = served_keys(Home.from_environment()) is not None
    header = ' -H "Authorization: Bearer $MORAY_API_KEY"' if keyed else ""
    body = f'{{"model": "{model}", "prompt": "In the beginning", "max_tokens": 40}}'
    server = url.removesuffix("/v1")
    lines = (
        f"try: curl {url}/completions{header} -H 'Content-Type: application/json' -d '{body}'",
        f"or open {server} in a browser, or: moray chat {server}",
    )
    for line in lines:
        err().print(line, markup=False, soft_wrap=True)
