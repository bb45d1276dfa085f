"""The result of a benchmark: printed rows, `results/NAME.json` for programs, and the outcome of its bars."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from harness.code_state import ROOT, measured_code

from moray.cluster.numba_cache import numba_cache

RESULTS = Path(__file__).resolve().parents[1] / "results"
# Set before the import of numba, which would otherwise reuse functions compiled before their callees changed.
os.environ["NUMBA_CACHE_DIR"] = str(numba_cache(Path(__file__).parents[2] / ".numba"))

Outcome = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Bar:
    """A goal: `value` should be at least (`higher`) or at most (`lower`) `goal`.

    If the value has a `standard_error` and lies within two of them of the goal, the outcome is undecided.
    """

    name: str
    value: float
    goal: float
    better: Literal["higher", "lower"]
    standard_error: float = 0.0

    @property
    def outcome(self) -> Outcome:
        if abs(self.value - self.goal) < 2 * self.standard_error:
            return "undecided"
        holds = self.value >= self.goal if self.better == "higher" else self.value <= self.goal
        return "holds" if holds else "fails"


def _version(package: str) -> str | None:
    """The installed version, or None. Kernel benchmarks run without Ray."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Processor, GPU, cores, operating system, and the versions of Python and the main packages."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    versions = {name: version for name in ("ray", "torch", "triton", "numpy") if (version := _version(name))}
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None
    return {
        "processor": names[0] if names else platform.processor(),
        "gpu": gpu,
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def revision() -> dict[str, Any]:
    """`commit` and `dirty` of the checkout, both None outside a git checkout, and `at`, in UTC.

    Changed results and docs do not make a checkout dirty, because benchmarks and `make pages` write them.
    """
    at = datetime.now(UTC).isoformat(timespec="seconds")
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
    return {"commit": commit, "dirty": None if changed is None else bool(changed), "at": at}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def command() -> str:
    """The command line, with the script's path relative to the checkout."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    return " ".join([Path(sys.executable).name, name, *sys.argv[1:]])


def report(name: str, rows: list[dict[str, Any]], bars: list[Bar], measures: Iterable[str] = ()) -> int:
    """Prints rows and bars and writes the JSON; returns 0 if every bar holds, else 1.

    `measures` names modules that only child processes load (see `measured_code`).
    """
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
                if not isinstance(value, list)
            )
        )
    for bar in bars:
        sign = ">=" if bar.better == "higher" else "<="
        error = f" +- {bar.standard_error:.2g}" if bar.standard_error else ""
        print(f"{bar.outcome}: {bar.name} {bar.value:.4g}{error} {sign} {bar.goal:.4g}")
    write(name, rows, bars, measures)
    return 0 if all(bar.outcome == "holds" for bar in bars) else 1


def write(name: str, rows: list[dict[str, Any]], bars: list[Bar], measures: Iterable[str] = ()) -> None:
    """Writes the JSON, replacing an existing one."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {
        "measured": revision(),
        "code": measured_code(measures),
        "machine": machine(),
        "command": command(),
        "rows": rows,
        "bars": [{**asdict(bar), "outcome": bar.outcome} for bar in bars],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
