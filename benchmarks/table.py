"""The bars of benchmarks as one table in Markdown, from what they wrote to results/: docs/data-benchmarks.md has it.

Usage: python benchmarks/table.py NAME... > TABLE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from harness.result import RESULTS


def table(names: Sequence[str]) -> str:
    """A row for each bar; those that do not hold are bold. Then the machines that it was measured on."""
    lines = ["| benchmark | what | measured | bar |", "|---|---|---|---|"]
    machines = {}
    for name in names:
        found = json.loads((RESULTS / f"{name}.json").read_text())
        machines[described(found["machine"])] = None
        for bar in found["bars"]:
            sign = "≥" if bar["better"] == "higher" else "≤"
            value = f"{bar['value']:,.4g}" if bar["holds"] else f"**{bar['value']:,.4g}**"
            lines.append(f"| `{name}` | {bar['name']} | {value} | {sign} {bar['goal']:,.4g} |")
    return "\n".join([*lines, "", *(f"Machine: {machine}." for machine in machines)])


def described(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, {versions}"


if __name__ == "__main__":
    print(table(sys.argv[1:]))
