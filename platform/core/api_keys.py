"""The keys with which programs call served models: made, listed and revoked in `MORAY_HOME/keys.json`.

The file has no key, only SHA-256 of each. A key is 256 random bits, so its hash needs no salt and no slow function.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from moray.platform.core.atomic import write_bytes
from moray.platform.core.errors import InputError, nearest
from moray.platform.core.home import Home

PAGE = "moray-page"  # the key of the control plane's page
_PREFIX = "mk-"
_SHOWN = 8  # characters of a key that lists show
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")


class ApiKey(BaseModel):
    """A key, without the key itself.

    sha256: of the key, in hex. prefix: its first characters. created, revoked: seconds since 1970; revoked 0: valid.
    requests, tokens: limits per minute; 0 for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str
    prefix: str = ""
    created: float = 0.0
    revoked: float = 0.0
    requests: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)


_KEYS = TypeAdapter(list[ApiKey])


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def read_keys(home: Home) -> list[ApiKey]:
    """All keys, also revoked ones, oldest first. Raises InputError for a file that is not readable."""
    try:
        return _KEYS.validate_json(home.keys.read_bytes())
    except FileNotFoundError:
        return []
    except (ValidationError, OSError) as error:
        reason = "not a list of keys" if isinstance(error, ValidationError) else error.strerror
        raise InputError(f"{home.keys}: {reason}", "restore the file, or remove it and make new keys") from error


def add_key(home: Home, name: str, requests: int = 0, tokens: int = 0) -> tuple[ApiKey, str]:
    """Makes a key, and returns it with its text, which is kept nowhere.

    requests, tokens: limits per minute; 0 for none. Raises InputError.
    """
    if not _NAME.fullmatch(name) or name == PAGE:
        raise InputError(f"{name!r:.80} cannot be the name of a key", "use up to 64 letters, digits, _ . @ and -")
    for flag, value in (("--rpm", requests), ("--tpm", tokens)):
        if not 0 <= value <= 10**12:
            raise InputError(f"{flag} {value}", f"use a positive number, or leave {flag} out for no limit")
    text = _PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        name=name,
        sha256=hash_key(text),
        prefix=text[:_SHOWN],
        created=time.time(),
        requests=requests,
        tokens=tokens,
    )
    with _changing(home) as keys:
        if any(one.name == name and not one.revoked for one in keys):
            raise InputError(f"a key {name!r} exists", f"use another name, or revoke it: moray keys revoke {name}")
        keys.append(key)
    return key, text


def revoke_key(home: Home, name: str) -> ApiKey:
    """Ends a key. Servers refuse it within seconds. Raises InputError."""
    with _changing(home) as keys:
        valid = [place for place, one in enumerate(keys) if one.name == name and not one.revoked]
        if not valid:
            known = [one.name for one in keys if not one.revoked]
            raise InputError(f"there is no valid key {name!r:.80}", nearest(name, known))
        keys[valid[0]] = keys[valid[0]].model_copy(update={"revoked": time.time()})
        return keys[valid[0]]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def served_keys(home: Home) -> list[ApiKey] | None:
    """The keys that servers accept, with the page's own; None if they ask for none, because no key was ever made.
    Raises InputError."""
    keys = read_keys(home)
    if not keys:
        return None
    valid = [key for key in keys if not key.revoked]
    page = page_key(home)
    return [*valid, ApiKey(name=PAGE, sha256=hash_key(page))] if page else valid


def check_guarded(home: Home, host: str) -> None:
    """Raises InputError if a server at `host` would answer other machines, and there is no key."""
    if not is_loopback(host) and all(key.revoked for key in read_keys(home)):
        raise InputError(
            f"a server at {host or '0.0.0.0'} answers other machines, so requests need keys, and there is none",
            "make one: moray keys add NAME; or serve on 127.0.0.1",
        )


def page_key(home: Home) -> str:
    """The key of the control plane's page, made from its token; "" without a control plane."""
    try:
        token = home.token.read_bytes().strip()
    except OSError:
        return ""
    return _PREFIX + hmac.new(token, b"served models", hashlib.sha256).hexdigest() if token else ""


@contextlib.contextmanager
def _changing(home: Home) -> Iterator[list[ApiKey]]:
    """The keys, which are written at the end of the block if they have changed. One process at a time."""
    with _locked(home.keys.with_suffix(".lock")):
        keys = read_keys(home)
        before = list(keys)
        yield keys
        if keys != before:
            write_bytes(home.keys, _KEYS.dump_json(keys, indent=2) + b"\n")  # of mode 0600


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
