"""`moray submit | list | status | logs | stop | why`: jobs of the control plane."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

from cyclopts import App, Parameter

from moray.platform.cli.parameters import ClusterName, Overrides, UploadAnyway, transfer_progress
from moray.platform.control.choices import LOCAL, Priority
from moray.platform.core.errors import InputError
from moray.platform.run.console import Json, err, out, print_json, print_table

_POLL_SECONDS = 0.5
_EXIT = {"succeeded": 0, "failed": 1, "cancelled": 130}


def register_jobs(app: App) -> None:
    """Adds the commands to the `moray` command."""
    for command in (submit, status, logs, stop, why):
        app.command(command)
    app.command(list_jobs, name="list")


def submit(
    recipe: str,
    /,
    *,
    set_: Overrides = None,
    name: Annotated[str, Parameter(help="name of the job (default: the recipe's)")] = "",
    priority: Priority = "interactive",
    retries: Annotated[int, Parameter(help="number of retries after a failed run")] = 0,
    cluster: ClusterName = LOCAL,
    yes: UploadAnyway = False,
    follow: Annotated[
        bool, Parameter(name=["--follow", "-f"], negative=(), help="print the log until the job ends")
    ] = False,
    key: Annotated[str, Parameter(help="idempotency key: submitting twice with the same key queues one job")] = "",
    json_: Json = False,
) -> int:
    """Queue a run of a recipe on a cluster of the control plane.

    RECIPE is a file, or the name of a recipe that ships with Moray. Relative paths in it are relative to the current
    folder. For another cluster than the local one, the files that it names are uploaded to the cluster's store.
    """
    from moray.platform.client import Client, new_key, read_submission, stored_files

    body = read_submission(recipe, set_ or []) | {"name": name, "priority": priority, "retries": retries}
    client = Client.from_environment()
    with transfer_progress() as progress:
        body |= stored_files(recipe, set_ or [], cluster, yes, progress)
    job = client.post("/api/jobs", body, key=key or new_key())
    if json_:
        print_json(job)
    else:
        out().print(job["id"], markup=False)
        err().print(f"follow: moray logs -f {job['id']}   or {client.url}/jobs/{job['id']}", markup=False)
    return _follow(client, job["id"], None) if follow else 0


def list_jobs(
    *,
    state: Annotated[list[str] | None, Parameter(negative=(), help="only jobs in this state; may be repeated")] = None,
    limit: Annotated[int, Parameter(help="maximum number of jobs")] = 20,
    json_: Json = False,
) -> int:
    """List jobs, newest first."""
    from moray.platform.client import Client

    jobs = Client.from_environment().get("/api/jobs", state=state, limit=limit)
    if json_:
        print_json(jobs)
        return 0
    if not jobs:
        err().print("no jobs yet; try: moray submit quickstart" if not state else "no jobs in this state")
        return 0
    columns = ("job", "name", "state", "priority", "cluster", "submitted", "time>", "attempts>", "reason")
    print_table(columns, [_row(job) for job in jobs])
    return 0


def status(job: str | None = None, /, *, json_: Json = False) -> int:
    """Show a job and its attempts, or without JOB the services, the cluster and the queue.

    JOB is a job's id or a unique part of it.
    """
    from moray.platform.client import Client

    client = Client.from_environment()
    if job is None:
        from moray.platform.cli.up_commands import show_overview

        return show_overview(client.get("/api/overview"), json_)
    found = client.get(f"/api/jobs/{_quoted(job)}")
    if json_:
        print_json(found)
        return 0
    out().print(f"{found['id']}  {found['state']}  {found['priority']}  {found['cluster']}", markup=False)
    if found["reason"]:
        out().print(found["reason"], markup=False)
    rows = [
        (a["id"], a["state"], _when(a["created"]), _took(a["started"], a["ended"]), a["detail"])
        for a in found["attempts"]
    ]
    if rows:
        print_table(("attempt", "state", "submitted", "time>", "detail"), rows)
    return 0


def logs(
    job: str,
    /,
    *,
    attempt: Annotated[int | None, Parameter(help="number of the attempt (default: the latest)")] = None,
    follow: Annotated[bool, Parameter(name=["--follow", "-f"], negative=(), help="print until the job ends")] = False,
) -> int:
    """Print a job's log. With -f, follow it until the job ends and return the job's exit code."""
    from moray.platform.client import Client

    client = Client.from_environment()
    if follow:
        return _follow(client, job, attempt)
    offset, ended = 0, False
    while not ended:
        part = client.get(f"/api/jobs/{_quoted(job)}/logs", attempt=attempt, offset=offset)
        sys.stdout.write(part["text"])
        ended = part["ended"] or not part["text"]
        offset = part["offset"]
    return 0


def stop(job: str, /, *, json_: Json = False) -> int:
    """Stop a job. A queued job stops at once, a running one when its driver has ended."""
    from moray.platform.client import Client

    found = Client.from_environment().post(f"/api/jobs/{_quoted(job)}/stop")
    if json_:
        print_json(found)
    else:
        out().print(f"{found['id']}  {found['state']}", markup=False)
    return 0


def why(name: str, /, *, json_: Json = False) -> int:
    """Explain the current state of a job, or of the deployment with this name, or of both."""
    from moray.platform.client import Client

    client, found = Client.from_environment(), {}
    for kind in ("jobs", "deployments"):
        try:
            found[kind] = client.get(f"/api/{kind}/{_quoted(name)}/why")
        except InputError:
            if kind == "deployments" and not found:
                return _why_neither(client, name)
    if json_:
        both = found.get("jobs", {}) | ({"deployment": found["deployments"]} if len(found) == 2 else {})
        print_json(both or found["deployments"])
        return 0
    for kind, one in found.items():
        out().print(f"{'deployment ' if kind == 'deployments' else ''}{one['id']}  {one['state']}", markup=False)
        for line in one["lines"]:
            out().print(f"  {line}", markup=False, soft_wrap=True)
    return 0


def _why_neither(client: Any, name: str) -> int:
    """Raises the error for a name that is neither a job's nor a deployment's."""
    try:
        client.get(f"/api/jobs/{_quoted(name)}/why")
    except InputError as error:
        raise InputError(f"{error.message}, and no deployment of this name", error.hint) from error
    return 0  # it has just been submitted


def _follow(client: Any, job: str, attempt: int | None) -> int:
    """Like `_print_log`; Ctrl-C stops following, not the job."""
    try:
        return _print_log(client, job, attempt)
    except KeyboardInterrupt:
        err().print(f"{job} keeps running   follow: moray logs -f {job}   stop: moray stop {job}")
        return 130


def _print_log(client: Any, job: str, attempt: int | None) -> int:
    """Prints a job's log as it grows, of all attempts unless one is given. Returns the job's exit code."""
    number, offset = attempt, 0
    while True:
        part = client.get(f"/api/jobs/{_quoted(job)}/logs", attempt=number, offset=offset)
        sys.stdout.write(part["text"])
        sys.stdout.flush()
        offset = part["offset"]
        number = number or part["attempt"]
        if not part["ended"]:
            if not part["text"]:
                time.sleep(_POLL_SECONDS)
            continue
        found = client.get(f"/api/jobs/{_quoted(job)}")
        if attempt is None and number and len(found["attempts"]) > number:
            number, offset = number + 1, 0
            err().print(f"attempt {number}", style="bold")
        elif found["state"] in _EXIT or attempt is not None:
            err().print(f"{found['id']}  {found['state']}  {found['reason']}".rstrip(), markup=False)
            return _EXIT.get(found["state"], 0)
        else:
            time.sleep(_POLL_SECONDS)


def _row(job: dict[str, Any]) -> tuple[str, ...]:
    took = _took(job["started"], job["ended"])
    reason = job["reason"] if job["state"] in ("failed", "queued", "cancelled") else ""
    attempts = str(len(job["attempts"]))
    first = (job["id"], job["name"], job["state"], job["priority"], job["cluster"])
    return *first, _when(job["created"]), took, attempts, reason


def _when(moment: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment)) if moment else "-"


def _took(started: float | None, ended: float | None) -> str:
    from moray.platform.run.terminal import seconds

    return seconds((ended or time.time()) - started) if started else "-"


def _quoted(name: str) -> str:
    from urllib.parse import quote

    if not name:
        raise InputError("job name is empty", "list the jobs with `moray list`")
    if "/" in name:  # never part of a job's URL
        raise InputError(f"unknown job {name!r}", "give its id, or a part of its name without a slash")
    return quote(name, safe="")
