"""How a benchmark says what it found: rows for people, `results/NAME.json` for machines, and whether its bars hold."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moray.cluster.numba_cache import numba_cache

RESULTS = Path(__file__).resolve().parents[1] / "results"
# Before numba is imported: it would run what it compiled of a kernel before what that calls was changed.
os.environ["NUMBA_CACHE_DIR"] = str(numba_cache(Path(__file__).parents[2] / ".numba"))


@dataclass(frozen=True)
class Bar:
    """A goal: `value` should be at least (`higher`) or at most (`lower`) `goal`."""

    name: str
    value: float
    goal: float
    better: Literal["higher", "lower"]

    @property
    def holds(self) -> bool:
        return self.value >= self.goal if self.better == "higher" else self.value <= self.goal


def _version(package: str) -> str | None:
    """None where it is not installed: benchmarks of kernels need no Ray."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The machine by processor, cores and system, with the versions that matter."""
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


def report(name: str, rows: list[dict[str, Any]], bars: list[Bar]) -> int:
    """Prints rows and bars, writes the JSON; returns 0 if every bar holds, else 1."""
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    for bar in bars:
        sign = ">=" if bar.better == "higher" else "<="
        print(f"{'holds' if bar.holds else 'FAILS'}: {bar.name} {bar.value:.4g} {sign} {bar.goal:.4g}")
    RESULTS.mkdir(exist_ok=True)
    content = {
        "machine": machine(),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "rows": rows,
        "bars": [{**asdict(bar), "holds": bar.holds} for bar in bars],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0 if all(bar.holds for bar in bars) else 1
