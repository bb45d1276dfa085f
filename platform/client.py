"""HTTP client of the control plane, for the command line and for Python. Returns plain data or raises MorayError."""

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
from typing import TYPE_CHECKING, Any

from moray.platform.control.auth import read_token
from moray.platform.control.choices import LOCAL
from moray.platform.core.errors import InputError, MorayError, StepFailed
from moray.platform.core.home import Home

if TYPE_CHECKING:
    from moray.platform.store.submitted import Progress

_RETRY_SECONDS = 60.0  # while the controller restarts: twice the supervisor's longest back-off
_TIMEOUT_SECONDS = 60.0  # of one request


class UnreachableError(StepFailed):
    """The control plane does not respond."""


class Client:
    """Client of the controller of one MORAY_HOME."""

    def __init__(self, url: str, token: str, is_up: Callable[[], bool] = lambda: True) -> None:
        """`is_up`: whether a supervisor is running that restarts the controller, so that retrying makes sense."""
        self.url = url
        self._is_up = is_up
        self._token = token
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy

    @classmethod
    def from_environment(cls) -> Client:
        """A client for `$MORAY_HOME`. Raises InputError if no control plane was ever started there."""
        from moray.platform.control.options import UpOptions, url
        from moray.platform.control.up import is_up

        home = Home.from_environment()
        return cls(url(UpOptions.read(home)), read_token(home), lambda: is_up(home))

    def get(self, path: str, **query: Any) -> Any:
        """Returns the response to a GET; query values that are None are omitted."""
        given = {name: value for name, value in query.items() if value is not None}
        return self._request("GET", path + ("?" + urllib.parse.urlencode(given, doseq=True) if given else ""))

    def post(self, path: str, body: dict[str, Any] | None = None, key: str | None = None) -> Any:
        """Returns the response to a POST. With an idempotency `key` the request is retried until it is answered."""
        return self._request("POST", path, body, key)

    def delete(self, path: str) -> Any:
        return self._request("DELETE", path)

    def _request(self, method: str, path: str, body: Any = None, key: str | None = None) -> Any:
        deadline = time.monotonic() + (_RETRY_SECONDS if method == "GET" or key else 0.0)
        while True:
            try:
                return self._once(method, path, body, key)
            except UnreachableError:
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
            with self._opener.open(request, timeout=_TIMEOUT_SECONDS) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            raise _as_moray_error(error) from error
        except OSError as error:  # also a response that was cut short
            raise UnreachableError(
                f"the control plane does not respond at {self.url}", "start it with `moray up`"
            ) from error
        except (http.client.HTTPException, ValueError) as error:
            raise UnreachableError(
                f"another program responds at {self.url}, not the control plane",
                "moray down, then moray up --port ANOTHER",
            ) from error


def new_key() -> str:
    """A new idempotency key: a request sent twice with the same key takes effect once."""
    return secrets.token_hex(16)


def read_submission(recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Reads and checks a recipe as `moray run` does; returns the body of a submission."""
    from moray.platform.api import open_recipe

    opened = open_recipe(recipe, overrides)
    folder = str(Path.cwd())
    return {"recipe": opened.source, "path": str(opened.path), "folder": folder, "set": list(overrides)}


def stored_files(
    recipe: str, overrides: Sequence[str], cluster: str, yes: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """The part of a submission's body that names its cluster, and the submitter's files in the cluster's store.

    For a cluster other than the local one, uploads the files of this machine that the recipe names. yes: also if they
    are larger than 1 GB. progress: called with the phase, bytes done and total bytes. Raises InputError.
    """
    if cluster == LOCAL:
        return {"cluster": cluster}
    from moray.platform.api import open_recipe, why_absent
    from moray.platform.control.profiles import load_profile
    from moray.platform.control.upload import upload_files

    profile = load_profile(Home.from_environment(), cluster)
    why_absent(profile)  # the job waits for a cluster that does not respond
    return {"cluster": cluster, "stored": upload_files(open_recipe(recipe, overrides), profile, yes, progress)}


def _as_moray_error(error: urllib.error.HTTPError) -> MorayError:
    """Converts an HTTP error response to a MorayError."""
    try:
        body = json.loads(error.read())
        message, hint = str(body["error"]), str(body.get("hint", ""))
    except (ValueError, KeyError, TypeError):
        message, hint = f"the control plane returned HTTP {error.code} {error.reason}", ""
    if error.code >= 500:
        return StepFailed(message, hint)
    return InputError(message, hint)
