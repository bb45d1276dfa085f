"""`moray up` and `moray down`, and the overview of `moray status`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from moray.platform.control.choices import LOCAL
from moray.platform.run.console import Json, err, out, print_json, print_table

if TYPE_CHECKING:
    from moray.platform.control.options import UpOptions
    from moray.platform.core.home import Home

Cpus = Annotated[int | None, Parameter(name="--cpus", help="CPU cores for jobs (default: all)")]
Gpus = Annotated[int | None, Parameter(name="--gpus", help="GPUs for jobs (default: all)")]
Slots = Annotated[int | None, Parameter(name="--slots", help="concurrent jobs (default: one per four cores)")]
Port = Annotated[int | None, Parameter(name="--port", help="port of the API and the page (default: 8400)")]
Foreground = Annotated[
    bool, Parameter(name="--foreground", negative=(), help="run in the foreground; Ctrl-C stops everything")
]
Systemd = Annotated[bool, Parameter(name="--systemd", negative=(), help="print a systemd user unit and exit")]


def register_up(app: App) -> None:
    """Adds the commands to the `moray` command."""
    app.command(up)
    app.command(down_command, name="down")


def up(
    *,
    port: Port = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    slots: Slots = None,
    foreground: Foreground = False,
    systemd: Systemd = False,
    json_: Json = False,
) -> int:
    """Start the control plane on this machine: Ray, MLflow, queue, schedules, API and page.

    Keeps services that are already running. Ports and sizes are saved for the next start.
    """
    from moray.platform.control import up as control
    from moray.platform.control.options import decide_options
    from moray.platform.core.home import Home

    home = Home.from_environment()
    if systemd:
        print(control.systemd_unit(home), end="")
        return 0
    if control.is_up(home):
        return _already_up(home, {"port": port, "cpus": cpus, "gpus": gpus, "slots": slots}, json_)
    options = decide_options(home, port=port, cpus=cpus, gpus=gpus, slots=slots)
    if foreground:
        err().print(f"page: {_page(home, options)}   (Ctrl-C stops everything)", markup=False, soft_wrap=True)
        control.supervise(home, lambda text: err().print(text, markup=False))
        return 0
    supervisor = control.start(home)
    began = time.monotonic()
    console = err()
    with console.status("starting") as status:
        for service in control.wait_until_up(home, supervisor):
            console.print(f"+ {service.name:<12} {time.monotonic() - began:5.1f} s", markup=False)
            status.update("starting")
    return _report(home, options, json_)


def down_command(*, json_: Json = False) -> int:
    """Stop everything that `moray up` started. Queued jobs stay queued; running jobs run again after the next start."""
    from moray.platform.control import up as control
    from moray.platform.core.home import Home

    with err().status("stopping"):
        ended = control.down(Home.from_environment())
    if json_:
        print_json({"processes": ended})
    else:
        out().print(f"stopped {ended} processes" if ended else "nothing was running")
    return 0


def show_overview(found: dict[str, Any], json_: bool) -> int:
    """Prints `moray status`: services, cluster, running and queued jobs."""
    from moray.platform.core.units import size

    if json_:
        print_json(found)
        return 0
    rows = [
        (s["name"], s["state"], str(s["pid"] or "-"), _ago(s["since"]), str(s["restarts"] or ""), s["detail"])
        for s in found["services"]
    ]
    print_table(("service", "state", "pid>", "for>", "restarts>", "last restart"), rows)
    c = found["cluster"]
    used = f"{c['cpus_used']:g} of {c['cpus']:g} CPU, {c['gpus_used']:g} of {c['gpus']:g} GPU"
    memory = f"memory {size(c['memory_used_bytes'])} of {size(c['memory_bytes'])}"
    dead = f" ({c['dead_nodes']} dead)" if c.get("dead_nodes") else ""
    nodes = f"{c['nodes']} {'node' if c['nodes'] == 1 else 'nodes'}{dead}"
    state = f"{nodes}, {used}, {memory}" if c["alive"] else "unreachable"
    out().print(f"\ncluster  {state}{'; ' + c['detail'] if c['detail'] else ''}", markup=False)
    queued, running = found["queued"], found["running"]
    for one in found["clusters"]:
        if one["name"] != LOCAL:
            state = one["error"] or f"{one['running']} of {one['slots']} jobs running, {one['queued']} queued"
            out().print(f"cluster  {one['name']} at {one['where'] or '?'}: {state}", markup=False)
            _show_hosts(one.get("usage"))
    out().print(
        f"jobs     {found['active']} running ({found['slots']} slots here), {found['waiting']} queued", markup=False
    )
    for job in (*running, *queued[:10]):
        out().print(f"  {job['id']}  {job['state']}  {job['priority']}  {job['cluster']}", markup=False)
    return 0


def _show_hosts(usage: dict[str, Any] | None) -> None:
    """Prints the hosts of a cluster other than the local one: what is in use, and whose drivers run where."""
    if usage is None:
        return
    for host in usage["hosts"]:
        state = f"{host['cpus_used']:g} of {host['cpus']:g} CPU" + (
            f", {host['gpus_used']:g} of {host['gpus']:g} GPU" if host["gpus"] else ""
        )
        drivers = f"; driver of {', '.join(host['drivers'])}" if host["drivers"] else ""
        name = f"{host['address']}{' (head)' if host['head'] else ''}"
        out().print(f"  {name}  {state if host['alive'] else 'dead'}{drivers}", markup=False)
    more = usage["nodes"] + usage["dead_nodes"] - len(usage["hosts"])
    if more > 0:
        out().print(f"  and {more} more hosts", markup=False)
    if usage["waiting"]:
        out().print(f"  pending demand: {', '.join(usage['waiting'])}", markup=False)


def _already_up(home: Home, requested: dict[str, int | None], json_: bool) -> int:
    """Handles `up` while the control plane is running: an error only if the options differ."""
    from moray.platform.control.options import UpOptions
    from moray.platform.core.errors import InputError

    options = UpOptions.read(home)
    current = {"port": options.port, **options.cluster.model_dump(include={"cpus", "gpus", "slots"})}
    for name, value in requested.items():
        if value is not None and value != current[name]:
            raise InputError(
                f"the control plane is already running with --{name} {current[name]}", "moray down, then moray up"
            )
    err().print("already running", style="dim")
    return _report(home, options, json_)


def _report(home: Home, options: UpOptions, json_: bool) -> int:
    from moray.platform.control.options import url
    from moray.platform.control.supervisor import read_state

    if json_:
        print_json({"url": url(options), "services": {name: s.pid for name, s in read_state(home).items()}})
        return 0
    out().print(f"page    {_page(home, options)}", markup=False, soft_wrap=True)
    out().print(f"mlflow  {url(options)}/mlflow/", markup=False)
    err().print("next: moray submit quickstart   (stop everything: moray down)", markup=False)
    return 0


def _page(home: Home, options: UpOptions) -> str:
    """The page's URL with the token in its fragment, which a browser does not send to the server."""
    from moray.platform.control.auth import ensure_token
    from moray.platform.control.options import url

    return f"{url(options)}/login#token={ensure_token(home)}"


def _ago(since: float) -> str:
    from moray.platform.run.terminal import seconds

    return seconds(max(0.0, time.time() - since))
