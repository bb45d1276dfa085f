"""`moray cluster`: the clusters that jobs run on. docs/clusters.md is the guide."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from cyclopts import App, Parameter

from moray.platform.cli.up_commands import Cpus, Gpus, Port, Slots, down_command, up
from moray.platform.control.choices import LOCAL
from moray.platform.run.console import Json, err, out, print_json, print_table

app = App(name="cluster", help="Add, check and list the clusters that jobs run on.", help_format="plaintext")
Variables = Annotated[
    list[str] | None,
    Parameter(name="--env", negative=(), help="NAME=VALUE for drivers and tasks; may be repeated; takes ${env:NAME}"),
]


@app.command(name="list")
def list_clusters(*, json_: Json = False) -> int:
    """List the clusters that jobs can be submitted to."""
    from moray.platform.control.profiles import known_names, load_profile, profile_path
    from moray.platform.core.errors import MorayError
    from moray.platform.core.home import Home

    home, rows = Home.from_environment(), []
    for name in known_names(home):
        row = {"name": name, "kind": LOCAL, "address": "this machine", "store": "", "profile": "", "error": ""}
        if name != LOCAL:
            row |= {"kind": "", "address": "", "profile": str(profile_path(home, name))}
            try:
                profile = load_profile(home, name)
                row |= {"kind": profile.kind, "address": profile.address, "store": profile.store}
            except MorayError as error:
                row["error"] = error.message
        rows.append(row)
    if json_:
        print_json(rows)
        return 0
    columns = ("cluster", "kind", "address", "store")
    print_table(columns, [(r["name"], r["kind"] or "wrong", r["address"] or r["error"], r["store"]) for r in rows])
    return 0


@app.command(name="add")
def add_cluster(
    name: str,
    /,
    *,
    address: Annotated[str, Parameter(help="of Ray's dashboard: http://HOST:8265")],
    store: Annotated[str, Parameter(help="s3://bucket/prefix, or a folder that all hosts see")],
    token: Annotated[str | None, Parameter(help="Ray's token, by reference: ${file:PATH} or ${env:NAME}")] = None,
    env: Variables = None,
    code: Annotated[
        Literal["package", "image"], Parameter(help="send Moray's code with each job, or expect it on the hosts")
    ] = "package",
    python: Annotated[str, Parameter(help="command that starts Python on the hosts")] = "python3",
    slots: Annotated[int, Parameter(help="concurrent jobs")] = 4,
    replace: Annotated[bool, Parameter(negative=(), help="replace an existing profile")] = False,
) -> int:
    """Add a Ray cluster that exists already. Writes its profile; `moray cluster check` then tries it."""
    from moray.platform.control.profiles import add_profile, parse_variables
    from moray.platform.core.home import Home

    fields = {
        "kind": "existing", "address": address, "store": store, "token": token,
        "environment": parse_variables(env or []), "code": code, "python": python, "slots": slots,
    }  # fmt: skip
    path = add_profile(Home.from_environment(), name, fields, replace)
    out().print(str(path), markup=False)
    err().print(f"next: moray cluster check {name}", markup=False)
    return 0


@app.command(name="check")
def check_command(name: str, /, *, json_: Json = False) -> int:
    """Check that jobs can run on a cluster, with one short job. Exit with 1 if something will not work."""
    from moray.platform.api import check_cluster
    from moray.platform.run.doctor import report_lines

    found = []
    for finding in check_cluster(name):
        found.append(finding)
        if not json_:
            for line in report_lines([finding]):
                out().print(line, markup=False)
    if json_:
        print_json([asdict(finding) for finding in found])
    return 1 if any(finding.state == "fail" for finding in found) else 0


@app.command(name="status")
def cluster_status(name: str, /, *, json_: Json = False) -> int:
    """Show the hosts of a cluster."""
    if name == LOCAL:
        from moray.platform.cli.up_commands import show_overview
        from moray.platform.client import Client

        return show_overview(Client.from_environment().get("/api/overview"), json_)
    from moray.platform.api import cluster_hosts
    from moray.platform.core.units import size

    where, usage = cluster_hosts(name)
    if json_:
        print_json({"name": name, "address": where, **asdict(usage)})
        return 0
    rows = [
        (
            host.address + (" (head)" if host.head else ""), "alive" if host.alive else "dead",
            f"{host.cpus_used:g} of {host.cpus:g}", f"{host.gpus_used:g} of {host.gpus:g}", size(host.memory_bytes),
        )
        for host in usage.hosts
    ]  # fmt: skip
    print_table(("host", "state", "CPU in use>", "GPU in use>", "memory>"), rows)
    return 0


@app.command(name="up")
def cluster_up(
    kind: Literal["local"],
    /,
    *,
    port: Port = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    slots: Slots = None,
    json_: Json = False,
) -> int:
    """Start a cluster. `local` is the same as `moray up`."""
    return up(port=port, cpus=cpus, gpus=gpus, slots=slots, json_=json_)


@app.command(name="down")
def cluster_down(kind: Literal["local"], /, *, json_: Json = False) -> int:
    """Stop a cluster. `local` is the same as `moray down`."""
    return down_command(json_=json_)
