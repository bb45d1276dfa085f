"""`moray doctor`: checks this machine against Moray's requirements and suggests fixes.

Each check is a function without arguments that returns a `Finding`. Checks start nothing and take less than a second.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moray.platform.core.errors import InputError, MorayError
from moray.platform.core.home import Home
from moray.platform.core.ports import is_free
from moray.platform.store.artifacts import ArtifactStore

GIB = 1 << 30
NEEDED = (
    "ray",
    "torch",
    "pyarrow",
    "numpy",
    "pydantic",
    "tokenizers",
    "numba",
    "safetensors",
    "mlflow",
    "fastapi",
)


@dataclass(frozen=True)
class Finding:
    """One line of the report: `ok`, `warn` (works with the limit in `fix`) or `fail` (something will not work)."""

    name: str
    state: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Runs all checks, in the order in which problems should be fixed."""
    shared = [_shared_root()] if os.environ.get("MORAY_ARTIFACTS") else []
    return [*(check() for check in _CHECKS), *shared]


def require_resources() -> None:
    """Raises InputError if this machine has too little memory or disk space to start anything."""
    for check in (_memory, _home):
        finding = check()
        if finding.state == "fail":
            raise InputError(f"{finding.name}: {finding.detail}", finding.fix)


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "ok", version)
    return Finding("python", "fail", version, "use Python 3.11, 3.12 or 3.13: make PYTHON=python3.11")


def _packages() -> Finding:
    versions, missing = [], []
    for name in NEEDED:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("packages", "fail", f"missing: {', '.join(missing)}", "make install")
    return Finding("packages", "ok", ", ".join(versions))


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores >= 2:
        return Finding("cores", "ok", str(cores))
    return Finding("cores", "warn", str(cores), "one core works, but training workers share it and take twice as long")


def _memory() -> Finding:
    available = _available_memory()
    detail = f"{available / GIB:.1f} GiB available"
    if available >= 4 * GIB:
        return Finding("memory", "ok", detail)
    if available >= 2 * GIB:
        return Finding("memory", "warn", detail, "4 GiB are recommended for the quickstart; close other programs")
    return Finding("memory", "fail", detail, "the quickstart needs at least 2 GiB; close other programs")


def _available_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _home() -> Finding:
    try:
        home = Home.from_environment()
    except MorayError as error:
        return Finding("home", "fail", error.message, error.hint)
    free = shutil.disk_usage(home.root).free
    detail = f"{home.root}, {free / GIB:.1f} GiB free"
    if free >= 2 * GIB:
        return Finding("home", "ok", detail)
    return Finding(
        "home", "fail" if free < GIB // 2 else "warn", detail, "free disk space, or set MORAY_HOME to another disk"
    )


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "warn", "no /dev/shm", "Ray stores objects on disk instead, which is slower")
    free = shutil.disk_usage(folder).free
    detail = f"/dev/shm, {free / GIB:.2f} GiB free"
    if free >= GIB // 4:
        return Finding("shared memory", "ok", detail)
    return Finding(
        "shared memory", "warn", detail, "increase it (containers: --shm-size=1g); otherwise Ray uses the disk"
    )


def _loopback() -> Finding:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        return Finding("loopback", "fail", f"cannot listen on 127.0.0.1: {error.strerror}", "allow loopback sockets")
    return Finding("loopback", "ok", "can listen on 127.0.0.1")


def _port(port: int = 8000) -> Finding:  # the default port of `moray serve`
    if not is_free(port):
        return Finding(f"port {port}", "warn", "in use", "`moray serve` uses it by default; choose another with --port")
    return Finding(f"port {port}", "ok", "free, the default of `moray serve`")


def _compiler() -> Finding:
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return Finding("compiler", "ok", path)
    needed = "models on CPUs are served about ten times slower without a C compiler, and Triton kernels do not run"
    return Finding("compiler", "warn", "none", f"{needed}: apt-get install gcc")


def _gpu() -> Finding:
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*")) if Path("/proc/driver/nvidia/gpus").exists() else []
    if not cards:
        return Finding("gpu", "ok", "none; training and serving run on the CPU")
    if "+cpu" in importlib.metadata.version("torch"):
        fix = "install torch's CUDA build in .venv, or run on the CPU"
        return Finding("gpu", "warn", f"{len(cards)} NVIDIA GPU(s), but torch is a CPU build", fix)
    return Finding("gpu", "ok", f"{len(cards)} NVIDIA GPU(s)")


def _shared_root() -> Finding:
    try:
        ArtifactStore(Home.from_environment()).check()
    except MorayError as error:
        return Finding("artifact root", "fail", error.message, error.hint or "check MORAY_ARTIFACTS")
    return Finding("artifact root", "ok", f"{os.environ['MORAY_ARTIFACTS']}, writable")


def _open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= 1024:
        return Finding("open files", "ok", str(soft))
    return Finding("open files", "warn", str(soft), f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}")


_CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _packages,
    _cores,
    _memory,
    _home,
    _shared_memory,
    _loopback,
    _port,
    _compiler,
    _gpu,
    _open_files,
)


def report_lines(findings: list[Finding]) -> Iterator[str]:
    """Formats the report as text: one line per check, followed by its fix."""
    marks = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
    for finding in findings:
        yield f"{marks[finding.state]}  {finding.name:<14} {finding.detail}"
        if finding.fix:
            yield f"      {'':<14} -> {finding.fix}"
