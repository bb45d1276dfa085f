"""The quickstart: `moray run quickstart` with an empty home, as shown in README.md.

The output after the last step is stored as printed, without the list of artifact folders.

Usage: python benchmarks/quickstart.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.result import Bar, report

MORAY = str(Path(sys.executable).with_name("moray"))
MEASURES = ("moray.pipelines.pretrain.step", "moray.pipelines.dedup.step", "moray.pipelines.evaluate.step")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="mry") as home:
        environment = os.environ | {"MORAY_HOME": home, "COLUMNS": "120", "NO_COLOR": "1"}
        began = time.perf_counter()
        done = subprocess.run(
            [MORAY, "run", "quickstart"], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        seconds = time.perf_counter() - began
        (found,) = Path(home).glob("artifacts/evaluate/*/manifest.json")
        bits = json.loads(found.read_text())["counts"]
    screen = [line.rstrip() for line in done.stdout.partition("\nartifacts")[0].splitlines()]
    rows: list[dict[str, Any]] = [{"wall_s": seconds, "bits_per_byte": bits["bits_per_byte"], "screen": screen}]
    ratio = bits["bits_per_byte"] / bits["order2_bits_per_byte"]
    bars = [
        Bar("held-out bits per byte over those of an order-2 byte model", ratio, 0.75, "lower"),
        Bar("wall time, minutes", seconds / 60, 10.0, "lower"),
    ]
    return report("quickstart", rows, bars, MEASURES)


if __name__ == "__main__":
    sys.exit(main())
