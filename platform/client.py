"""The control plane's API for the command line and for Python: requests out, plain data or a MorayError back."""

from __future__ import annotations

import http.client
import json
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moray.platform.control.auth import read_token
from moray.platform.core.errors import InputError, MorayError, StepFailed
from moray.platform.core.home import Home

_PATIENCE_SECONDS = 60.0  # for a controller that is being restarted: twice the longest that the supervisor waits
_SECONDS = 60.0


class AwayError(StepFailed):
    """The control plane does not answer."""


class Client:
    """Talks to the controller of one MORAY_HOME."""

    def __init__(self, url: str, token: str, is_up: Callable[[], bool] = lambda: True) -> None:
        """`is_up`: whether somebody restarts a controller that does not answer, so that waiting for it makes sense."""
        self.url = url
        self._is_up = is_up
        self._token = token
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy

    @classmethod
    def from_environment(cls) -> Client:
        """The client of `$MORAY_HOME`. Raises InputError if no control plane was ever started there."""
        from moray.platform.control.options import UpOptions, url
        from moray.platform.control.up import is_up

        home = Home.from_environment()
        return cls(url(UpOptions.read(home)), read_token(home), lambda: is_up(home))

    def get(self, path: str, **query: Any) -> Any:
        """The answer to a GET; query values that are None are left out."""
        given = {name: value for name, value in query.items() if value is not None}
        return self._request("GET", path + ("?" + urllib.parse.urlencode(given, doseq=True) if given else ""))

    def post(self, path: str, body: dict[str, Any] | None = None, key: str | None = None) -> Any:
        """The answer to a POST. With an idempotency `key` it may be repeated, and is, until it has been answered."""
        return self._request("POST", path, body, key)

    def delete(self, path: str) -> Any:
        return self._request("DELETE", path)

    def _request(self, method: str, path: str, body: Any = None, key: str | None = None) -> Any:
        deadline = time.monotonic() + (_PATIENCE_SECONDS if method == "GET" or key else 0.0)
        while True:
            try:
                return self._once(method, path, body, key)
            except AwayError:
                if time.monotonic() > deadline or not self._is_up():
                    raise
                time.sleep(0.5)

    def _once(self, method: str, path: str, body: Any, key: str | None) -> Any:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        if key:
            headers["Idempotency-Key"] = key
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=_SECONDS) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            raise _refused(error) from error
        except OSError as error:  # also what cuts an answer short
            raise AwayError(f"the control plane does not answer at {self.url}", "moray up starts it") from error
        except (http.client.HTTPException, ValueError) as error:
            raise AwayError(
                f"what answers at {self.url} is not the control plane", "moray down, then moray up --port ANOTHER"
            ) from error


def new_key() -> str:
    """A key that makes a request that is sent twice count once."""
    return secrets.token_hex(16)


def read_submission(recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A recipe, read and checked here as `moray run` would, as the body of a submission."""
    from moray.platform.api import open_recipe

    opened = open_recipe(recipe, overrides)
    folder = str(Path.cwd())
    return {"recipe": opened.source, "path": str(opened.path), "folder": folder, "set": list(overrides)}


def _refused(error: urllib.error.HTTPError) -> MorayError:
    """The error that the answer describes."""
    try:
        said = json.loads(error.read())
        message, hint = str(said["error"]), str(said.get("hint", ""))
    except (ValueError, KeyError, TypeError):
        message, hint = f"the control plane answered {error.code} {error.reason}", ""
    if error.code >= 500:
        return StepFailed(message, hint)
    return InputError(message, hint)
