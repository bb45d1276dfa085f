"""`moray deploy` and `moray deployments`: models that a cluster keeps serving; docs/deployments.md."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from cyclopts import App, Parameter

from moray.platform.cli.first_requests import show_first_requests
from moray.platform.cli.parameters import ClusterName
from moray.platform.control.choices import LOCAL
from moray.platform.core.errors import InputError, StepFailed
from moray.platform.core.units import parse_size
from moray.platform.run.console import Json, err, out, print_json, print_table

app = App(name="deployments", help="Models that a cluster keeps serving.", help_format="plaintext")
_POLL_SECONDS = 0.3

Name = Annotated[str, Parameter(help="name of a deployment")]


def register_deploy(root: App) -> None:
    """Adds `moray deploy` and `moray deployments` to the command line."""
    root.command(deploy)
    root.command(app)


def deploy(
    model: str,
    /,
    *,
    name: Annotated[str, Parameter(help="name and path of the deployment (default: the alias' name)")] = "",
    replicas: Annotated[str, Parameter(help="number of replicas, or MIN..MAX to scale with the load")] = "1",
    cluster: ClusterName = LOCAL,
    port: Annotated[int | None, Parameter(help="of the cluster's ingress (default: 8000)")] = None,
    cpus: Annotated[float, Parameter(help="CPUs that a replica reserves (default: half a CPU)")] = 0.0,
    gpus: Annotated[
        int | None, Parameter(help="GPUs that a replica reserves, 0 or 1 (default: 1 if there is one)")
    ] = None,
    memory: Annotated[str, Parameter(help="memory that a replica reserves, such as 8GB")] = "",
    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="auto: a GPU if there is one")] = "auto",
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Parameter(help="of weights")] = "auto",
    quantize: Annotated[Literal["", "int8"], Parameter(help="on CPUs: INT8 weights, a scale per output")] = "",
    cache_bytes: Annotated[str, Parameter(help="memory of a replica's cache, such as 8GB")] = "",
    max_running: Annotated[int, Parameter(help="sequences that decode at the same time, in each replica")] = 256,
    threads: Annotated[int, Parameter(help="CPU threads of each replica")] = 1,
    target_tokens: Annotated[
        int, Parameter(help="with MIN..MAX: tokens that the requests of a replica still read or write")
    ] = 2048,
    wait: Annotated[bool, Parameter(help="wait until the model answers")] = True,
    json_: Json = False,
) -> int:
    """Serve a model on a cluster until `moray deployments stop`. Deploying it again applies what has changed.

    MODEL is an alias (`quickstart`, `quickstart@newest`), which the deployment follows; or an artifact
    (`export/FINGERPRINT`); or, on this machine, a folder in the Hugging Face DeepSeek-V3 layout.
    """
    from moray.platform.client import Client

    least, most = _range(replicas)
    options: dict[str, Any] = {
        "device": device, "dtype": dtype, "quantize": quantize,
        "cache_bytes": parse_size(cache_bytes) if cache_bytes else 0,
        "max_running": max_running, "threads": threads, "replicas": least, "most_replicas": most, "cpus": cpus,
        "gpus": -1 if gpus is None else gpus, "memory_bytes": parse_size(memory) if memory else 0,
        "target_tokens": target_tokens,
    }  # fmt: skip
    body = {
        "model": _folder(model) or model, "name": name, "cluster": cluster, "port": port,
        "options": options,
    }  # fmt: skip
    client = Client.from_environment()
    return _shown(client, client.post("/api/deployments", body), wait, json_)


@app.command(name="list")
def list_deployments(*, json_: Json = False) -> int:
    """List all deployments."""
    from moray.platform.client import Client

    found = Client.from_environment().get("/api/deployments")
    if json_:
        print_json(found)
        return 0
    rows = [
        (
            one["name"], one["model"], _version(one), one["state"], _replicas(one), one["cluster"],
            (one["urls"] or ["-"])[0], one["reason"],
        )
        for one in found
    ]  # fmt: skip
    print_table(("deployment", "model", "version", "state", "replicas", "cluster", "url", "reason"), rows)
    return 0


@app.command(name="status")
def deployment_status(name: Name, /, *, json_: Json = False) -> int:
    """Show a deployment: its state and the reason for it, versions, replicas, addresses."""
    from moray.platform.client import Client

    found = Client.from_environment().get(_path(name))
    if json_:
        print_json(found)
        return 0
    facts = {
        "state": found["state"] + (f": {found['reason']}" if found["reason"] else ""),
        "model": found["model"],
        "version": _version(found),
        "replicas": _replicas(found),
        "requests": _requests(found["served"]),
        "hosts": ", ".join(sorted({one["host"] for one in found["replicas_seen"] if one["host"]})) or "-",
        "cluster": found["cluster"],
        "url": ", ".join(found["urls"]) or "-",
    }
    out().print(found["name"], style="bold", markup=False)
    for label, value in facts.items():
        out().print(f"  {label:<9} {value}", markup=False, soft_wrap=True)
    out().print()
    rows = [
        (str(one["version"]), one["state"], one["reference"], _moment(one["since"]), one["reason"])
        for one in reversed(found["versions"])
    ]
    print_table(("version", "state", "model", "since", "reason"), rows)
    return 0


@app.command(name="history")
def deployment_history(name: Name, /, *, json_: Json = False) -> int:
    """Show what happened to a deployment and its versions."""
    from moray.platform.client import Client

    found = Client.from_environment().get(f"{_path(name)}/history")
    if json_:
        print_json(found)
        return 0
    rows = [(_moment(row["time"]), str(row["version"] or "-"), row["state"], row["reason"]) for row in found]
    print_table(("time", "version", "state", "reason"), rows)
    return 0


@app.command(name="stop")
def stop_deployment(name: Name, /, *, wait: bool = True, json_: Json = False) -> int:
    """Stop a deployment. Open requests are finished first."""
    from moray.platform.client import Client

    client = Client.from_environment()
    found = client.post(f"{_path(name)}/stop")
    while wait and found["state"] != "stopped":
        time.sleep(_POLL_SECONDS)
        found = client.get(_path(name))
    if json_:
        print_json(found)
    else:
        out().print(f"{name}: {found['state']}", markup=False)
    return 0


@app.command
def rollback(
    name: Name,
    /,
    *,
    to: Annotated[int | None, Parameter(help="the version to return to (default: the one before)")] = None,
    wait: bool = True,
    json_: Json = False,
) -> int:
    """Return to an earlier version. Its alias is followed again when it names another model."""
    from moray.platform.client import Client

    client = Client.from_environment()
    return _shown(client, client.post(f"{_path(name)}/rollback", {"to": to}), wait, json_)


@app.command(name="rm")
def remove(
    name: Name,
    /,
    *,
    force: Annotated[bool, Parameter(help="also if it has not stopped and its cluster does not respond")] = False,
    json_: Json = False,
) -> int:
    """Remove a stopped deployment from the list. The counts of its requests are kept."""
    from moray.platform.client import Client

    Client.from_environment().delete(f"{_path(name)}?force=true" if force else _path(name))
    if json_:
        print_json({"removed": name})
    else:
        out().print(f"removed {name}", markup=False)
    return 0


def _folder(model: str) -> str:
    """The absolute path of a folder of this machine; "" if MODEL is none. Raises InputError."""
    if not model.strip():
        raise InputError("MODEL is empty", "give an alias, such as quickstart, an artifact or a folder")
    try:
        path = Path(model).expanduser()
        return str(path.absolute()) if path.is_dir() else ""
    except (OSError, ValueError, RuntimeError):  # too long, or no such home
        return ""


def _range(text: str) -> tuple[int, int]:
    """Parses N or MIN..MAX; the second number is 0 without one."""
    match = re.fullmatch(r"([0-9]{1,9})(?:\.\.([0-9]{1,9}))?", text.strip())
    if match is None:
        raise InputError(f"--replicas {text!r:.80} is not a number or a range", "for example --replicas 2, or 1..4")
    if match.group(2) == "0":
        raise InputError(f"--replicas {text}: the second number is the most", "use 1 or more")
    return int(match.group(1)), int(match.group(2) or 0)


def _shown(client: Any, found: dict[str, Any], wait: bool, json_: bool) -> int:
    """Prints a deployment that has a new version, once that is live unless `wait` is off."""
    if wait:
        found = _followed(client, found, quiet=json_)
    if json_:
        print_json(found)
    else:
        _announce(found)
    return 0


def _followed(client: Any, found: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """Waits until the version that starts is live. Raises StepFailed with the reason if it fails."""
    console, began, said = err(), time.monotonic(), ""
    number = max((one["version"] for one in found["versions"] if one["state"] == "starting"), default=found["live"])
    with console.status("", spinner="dots") if not quiet else contextlib.nullcontext() as shown:
        while found["state"] not in ("running", "failed", "stopped") or _state_of(found, number) == "starting":
            text = f"{found['name']}: {found['state']} {found['reason']}".rstrip()
            if shown is not None:
                shown.update(f"{text}  {time.monotonic() - began:.0f} s")
            if not quiet and text != said and not console.is_terminal:
                console.print(text, markup=False, soft_wrap=True)
            said = text
            time.sleep(_POLL_SECONDS)
            found = client.get(_path(found["name"]))
    if found["state"] != "running" or _state_of(found, number) != "live":
        raise StepFailed(
            f"{found['name']} is {found['state']}: {found['reason']}", "moray deployments status " + found["name"]
        )
    return found


def _state_of(found: dict[str, Any], number: int | None) -> str:
    return next((str(one["state"]) for one in found["versions"] if one["version"] == number), "")


def _announce(found: dict[str, Any]) -> None:
    url = (found["urls"] or [f"http://127.0.0.1:{found['port']}/v1"])[0]
    starting = [one["version"] for one in found["versions"] if one["state"] == "starting"]
    version = f"version {starting[-1]} starts" if starting else f"version {_version(found)} at {url}"
    out().print(f"{found['name']}: {found['state']}, {version}", markup=False)
    if found["reason"]:
        out().print(f"  {found['reason']}", markup=False, soft_wrap=True)
    show_first_requests(url, found["name"])


def _version(found: dict[str, Any]) -> str:
    return "-" if found["live"] is None else str(found["live"])


def _replicas(found: dict[str, Any]) -> str:
    wanted = f"{found['replicas']}..{found['most_replicas']}" if found["most_replicas"] else str(found["replicas"])
    return f"{found['ready']} of {wanted}"


def _requests(served: dict[str, Any] | None) -> str:
    """What has been served and what is served now, in words."""
    if not served:
        return "-"
    parts = [f"{served['requests']:,} ({served['failed']:,} failed)", f"{served['completion_tokens']:,} tokens"]
    if served["first_token"]:
        parts.append(f"first token after {served['first_token'][0] * 1e3:.0f} ms")
    parts.append(f"now {served['running']} running, {served['tokens_per_second']:.0f} tokens/s")
    return ", ".join(parts)


def _moment(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _path(name: str) -> str:
    if not name.strip():
        raise InputError("the name of the deployment is empty", "moray deployments list")
    return f"/api/deployments/{quote(name, safe='')}"
