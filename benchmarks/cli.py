"""Startup time of the command line: `moray --help` and `moray plan quickstart`, compared with a bare Python.

Measures the wall time of the whole process. Each value is the median of nine runs, and the commands alternate.
Usage: python benchmarks/cli.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.result import Bar, report

MORAY = str(Path(sys.executable).with_name("moray"))
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "moray --help": [MORAY, "--help"],
    "moray plan quickstart": [MORAY, "plan", "quickstart"],
}
ROUNDS = 9


def main() -> int:
    with tempfile.TemporaryDirectory() as home:
        times: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for turn in range(ROUNDS + 1):
            for name, command in COMMANDS.items():
                began = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={"MORAY_HOME": home})
                if turn:  # the first round warms the disk cache
                    times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in times.items()}
    bare = median["python -c pass"]
    rows = [
        {"command": name, "median_s": value, "ratio_to_bare_python": value / bare} for name, value in median.items()
    ]
    bars = [
        Bar("moray --help, seconds", median["moray --help"], 0.3, "lower"),
        Bar("moray plan quickstart, seconds", median["moray plan quickstart"], 1.0, "lower"),
    ]
    return report("cli", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
