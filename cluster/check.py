"""`moray cluster check`: what may keep jobs from running on an existing cluster, each with its fix."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import secrets
import shlex
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from moray.cluster.existing import ExistingJobs
from moray.cluster.probe import PACKAGES, STORE_PROBLEM, result_path
from moray.platform.control.profiles import Profile
from moray.platform.core.cluster import BackendRefusedError, BackendUnreachableError, Host
from moray.platform.core.errors import MorayError
from moray.platform.run.doctor import Finding
from moray.platform.store.paths import check_store, remove_folder, set_store_variables

_JOB_SECONDS = 240.0
_SKEW_SECONDS = 5.0
_SHOWN = 3  # hosts in a line
_RECONNECT_SECONDS = 60.0  # Ray's default: workers give up after a head has been away for so long


def examine_cluster(profile: Profile) -> Iterator[Finding]:
    """Yields the findings in the order in which problems should be fixed. Runs one short job on the cluster."""
    jobs = ExistingJobs(profile)
    set_store_variables(profile.store, profile.variables())
    try:
        version = jobs.version()
    except BackendUnreachableError as error:
        yield Finding("dashboard", "fail", f"{profile.address}: {error}", _fix(error))
        return
    yield Finding("dashboard", "ok", profile.address)
    yield _ray_version(version)
    try:
        check_store(profile.store)
        yield Finding("store, from here", "ok", profile.store)
    except (MorayError, OSError) as error:
        yield Finding("store, from here", "fail", str(error), getattr(error, "hint", "") or "correct `store`")
        return
    try:
        hosts = jobs.hosts()
    except BackendUnreachableError as error:
        yield Finding("hosts", "fail", str(error), "see Ray's dashboard")
        return
    yield _hosts(hosts)
    yield from _probe(profile, jobs, hosts)


def _fix(error: BackendUnreachableError) -> str:
    if isinstance(error, BackendRefusedError):
        return "correct `address` of the profile, or `token`, such as ${file:~/.ray/auth_token}"
    return "start Ray's head, or correct `address`"


def _ray_version(version: str) -> Finding:
    own = importlib.metadata.version("ray")
    if version == own:
        return Finding("ray", "ok", version)
    return Finding("ray", "fail", f"{version} on the cluster, {own} here", f"install ray=={own} on the cluster's hosts")


def _hosts(hosts: Sequence[Host]) -> Finding:
    alive = [host for host in hosts if host.alive]
    detail = f"{len(alive)} alive, {sum(host.cpus for host in alive):g} CPU, {sum(host.gpus for host in alive):g} GPU"
    if any(not host.head for host in alive):
        return Finding("hosts", "ok", detail)
    return Finding("hosts", "warn", detail, "drivers run on the head, and are lost with it: add a node")


def _probe(profile: Profile, jobs: ExistingJobs, hosts: Sequence[Host]) -> Iterator[Finding]:
    """Runs the probe, and judges what the hosts say."""
    name = f"probe-{secrets.token_hex(4)}"
    python = [*shlex.split(profile.python), "-P", "-m", "moray.cluster.probe", name, "--store", profile.store]
    began = time.time()
    try:
        found = _run(jobs, name, shlex.join(python), profile.store)
    except MorayError as error:
        yield Finding("job", "fail", error.message, error.hint)
        return
    yield Finding("job", "ok", f"ran in {time.time() - began:.0f} s")
    yield from _answers(found)
    yield from _settings(found, hosts)


def _run(jobs: ExistingJobs, name: str, entrypoint: str, store: str) -> list[dict[str, Any]]:
    path = result_path(store, name)
    try:
        body = {"entrypoint": entrypoint, "submission_id": name, "runtime_env": jobs.runtime_env({})}
        response = jobs.request("POST", "/api/jobs/", body)
        if not response.ok:
            raise MorayError(f"Ray rejected the job: {response.text.strip().splitlines()[-1:]}", "see Ray's dashboard")
        deadline = time.monotonic() + _JOB_SECONDS
        while time.monotonic() < deadline:
            state = jobs.observe().get(name)
            if state is None or state.state not in ("pending", "running"):
                break
            time.sleep(0.5)
        try:
            found: list[dict[str, Any]] = json.loads(path.read_bytes())
            return found
        except FileNotFoundError:
            log = jobs.request("GET", f"/api/jobs/{name}/logs").json().get("logs", "")
            last = (str(log).strip().splitlines() or [state.detail if state else "no log"])[-1]
            fix = "see the job in Ray's dashboard"
            if "ModuleNotFoundError" in last:
                fix = "set `python` of the profile to one that has the packages of constraints.txt"
            elif STORE_PROBLEM in last:
                fix = "add AWS_... variables, AWS_ENDPOINT_URL among them, to `environment` of the profile"
            raise MorayError(f"the job failed: {last[:300]}", fix) from None
    except BackendUnreachableError as error:
        raise MorayError(str(error), "see Ray's dashboard") from error
    finally:
        with contextlib.suppress(MorayError, BackendUnreachableError):
            remove_folder(path.parent)
            jobs.stop(name)
            jobs.forget(name)


def _answers(found: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """What the hosts say of themselves, a line for each kind."""
    answers = [one for one in found if "error" not in one]
    for one in found:
        if "error" in one:
            yield Finding("host", "fail", f"{one['host']}: {one['error']}", "see Ray's logs of that node")
    yield _versions(answers)
    yield _of_hosts(
        "store", answers, "fail", "set credentials on the hosts, or in `environment` of the profile", "written and read"
    )
    yield _of_hosts("home", answers, "fail", "set MORAY_HOME in `environment` to a writable folder", "writable")
    skewed = [{**one, "clock": _skew(one["skew"])} for one in answers]
    yield _of_hosts("clock", skewed, "warn", "run NTP on the hosts", f"within {_SKEW_SECONDS:.0f} s of the store's")
    yield Finding("gpus", "ok", str(sum(one["gpus"] for one in answers)))


def _of_hosts(
    name: str, answers: Sequence[dict[str, Any]], state: Literal["warn", "fail"], fix: str, ok: str
) -> Finding:
    """A finding about one thing that every host says; "" is no problem."""
    bad = [f"{one['host']}: {one[name]}" for one in answers if one[name]]
    if not bad:
        return Finding(f"{name} of hosts", "ok", f"{ok} on {len(answers)}")
    more = f"; and {len(bad) - _SHOWN} more hosts" if len(bad) > _SHOWN else ""
    return Finding(f"{name} of hosts", state, "; ".join(bad[:_SHOWN]) + more, fix)


def _skew(seconds: float) -> str:
    return "" if abs(seconds) <= _SKEW_SECONDS else f"{seconds:+.0f} s from the store's clock"


def _versions(answers: Sequence[dict[str, Any]]) -> Finding:
    """Compares the hosts' versions with those here."""
    here = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    found = sorted(
        {
            f"{name} {theirs or 'missing'} instead of {own}"
            for one in answers
            for name, own in here.items()
            if (theirs := one["packages"].get(name, one["python"])) != own
        }
    )
    if not found:
        return Finding("versions", "ok", f"as here, on {len(answers)} hosts")
    wrong = any("missing" in text or text.startswith(("ray ", "python ")) for text in found)
    return Finding("versions", "fail" if wrong else "warn", "; ".join(found), "install them from constraints.txt there")


def _settings(found: Sequence[dict[str, Any]], hosts: Sequence[Host]) -> Iterator[Finding]:
    """Settings of Ray that decide what a lost head costs."""
    answers = [one for one in found if "error" not in one]
    storage = next((one["gcs_storage"] for one in answers if one["gcs_storage"]), "")
    if storage in ("rocksdb", "redis"):
        yield Finding("ray's state", "ok", f"survives the head, in {storage}")
    else:
        fix = "start the head with RAY_gcs_storage=rocksdb and RAY_gcs_storage_path"
        detail = "in memory: a lost head ends all jobs, which are then tried again" if storage else "unknown"
        yield Finding("ray's state", "warn", detail, fix)
    short = [one["host"] for one in answers if float(one["reconnect_seconds"] or 0) <= _RECONNECT_SECONDS]
    if short and any(not host.head for host in hosts):
        detail = f"{_RECONNECT_SECONDS:.0f} s on {', '.join(short[:_SHOWN])}: nodes end if the head is away longer"
        yield Finding("reconnecting", "warn", detail, "start Ray with RAY_gcs_rpc_server_reconnect_timeout_s=600")
