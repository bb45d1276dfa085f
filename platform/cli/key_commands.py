"""`moray keys`: the keys with which programs call served models."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from cyclopts import App, Parameter

from moray.platform.core.api_keys import ApiKey, add_key, read_keys, revoke_key
from moray.platform.core.home import Home
from moray.platform.run.console import Json, err, out, print_json, print_table

app = App(name="keys", help="Keys with which programs call served models.", help_format="plaintext")


@app.command(name="add")
def add_(
    name: str,
    /,
    *,
    rpm: Annotated[int, Parameter(help="requests per minute (default: no limit)")] = 0,
    tpm: Annotated[int, Parameter(help="tokens per minute, of prompts and answers (default: no limit)")] = 0,
    json_: Json = False,
) -> int:
    """Make a key, and print it. It is shown only now: Moray keeps its hash.

    As soon as there is a key, all models that are served from this MORAY_HOME need one, within seconds.
    """
    key, text = add_key(Home.from_environment(), name, rpm, tpm)
    if json_:
        print_json({**_shown(key), "key": text})
        return 0
    out().print(text, markup=False, highlight=False, soft_wrap=True)
    err().print("keep it: it cannot be shown again; programs send it as Authorization: Bearer KEY", markup=False)
    return 0


@app.command(name="list")
def list_(*, json_: Json = False) -> int:
    """List all keys, with their limits per minute."""
    keys = read_keys(Home.from_environment())
    if json_:
        print_json([_shown(key) for key in keys])
        return 0
    if not keys:
        err().print("no keys: models that are served on this machine answer it without one", markup=False)
        return 0
    rows = [
        [key.name, f"{key.prefix}...", _day(key.created), str(key.requests or "-"), str(key.tokens or "-"), _state(key)]
        for key in keys
    ]
    print_table(["name", "key", "made", "requests/min>", "tokens/min>", "state"], rows)
    return 0


@app.command(name="revoke")
def revoke_(name: str, /, *, json_: Json = False) -> int:
    """End a key. Servers refuse it within seconds."""
    key = revoke_key(Home.from_environment(), name)
    if json_:
        print_json(_shown(key))
    else:
        out().print(f"{name}: revoked", markup=False)
    return 0


def _shown(key: ApiKey) -> dict[str, Any]:
    return {
        "name": key.name,
        "prefix": key.prefix,
        "created": key.created,
        "revoked": key.revoked or None,
        "requests_per_minute": key.requests or None,
        "tokens_per_minute": key.tokens or None,
    }


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _state(key: ApiKey) -> str:
    return f"revoked {_day(key.revoked)}" if key.revoked else "valid"
