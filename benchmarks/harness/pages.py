"""Fills the measured numbers of README.md and docs/ from `benchmarks/results/`.

A page refers to a number by a result, a JMESPath expression in it, a Python format and, optionally, a factor:

    takes <!-- result dedup_pipeline: rows[0].wall_s; .0f -->12<!-- / --> s

A table has its template in a comment. Numbers are written in braces, in the same notation:

    <!-- table
    | engine | MB/s |
    |---|---|
    | Daft | {dedup_engine: rows[?engine=='daft'].MB_per_cpu_s; .1f} |
    -->
    ...
    <!-- /table -->

`{bars: NAME ...}` is a row for each bar of these results. `{results: NAME ...}` is a row for each result, or for all
results if no names are given. `{screen: NAME}` is the terminal output stored in a result.

Usage, in benchmarks/: python -m harness.pages [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jmespath
from harness.code_state import ROOT, is_current

RESULTS = ROOT / "benchmarks" / "results"
HTML_BLOCK = re.compile(r"^\s*<!-- result", re.M)  # Markdown ends a paragraph before a line that begins with a comment
NUMBER = re.compile(r"(<!-- result (.*?) -->)(.*?)(<!-- / -->)", re.S)
TABLE = re.compile(r"(<!-- table\n(.*?)\n-->\n)(.*?)(\n?<!-- /table -->)", re.S)
OLDER = "†"  # the code has changed since the measurement, or the result does not record it


class PageError(Exception):
    """A page refers to a number that is in no result, or has an invalid reference."""


@cache
def result(name: str) -> dict[str, Any]:
    """The JSON of a result. `name` may omit the device if there is only one: kernels_gpu for kernels_gpu-DEVICE."""
    path = RESULTS / f"{name}.json"
    devices = sorted(RESULTS.glob(f"{name}-*.json"))
    if not path.is_file() and len(devices) == 1:
        (path,) = devices
    if not path.is_file():
        raise PageError(f"no result {name}: {path} does not exist")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def value_of(reference: str) -> str:
    """The number of `NAME: EXPRESSION; [FACTOR] FORMAT`, formatted."""
    match = re.fullmatch(r"\s*(\S+):\s*(.+?);\s*(?:(\S+)\s+)?(\S+)\s*", reference, re.S)
    if not match:
        raise PageError(f"`{reference}` is not NAME: EXPRESSION; FORMAT")
    name, expression, factor, form = match.groups()
    try:
        found = jmespath.search(" ".join(expression.split()), result(name))
    except jmespath.exceptions.JMESPathError as error:
        raise PageError(f"`{expression}`, of {name}.json: {error}") from error
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if found is None or isinstance(found, list | dict):
        raise PageError(f"`{expression}` is not one value of {name}.json but {json.dumps(found)[:80]}")
    try:
        return format(found * float(factor) if factor else found, form)
    except (TypeError, ValueError) as error:
        raise PageError(f"`{reference}`: {error}") from error


def bars_of(names: str) -> str:
    """A table row for each bar: benchmark, measure, value, goal. Values of bars that do not hold are bold."""
    lines = []
    for name in names.split():
        found = result(name)
        mark = "" if is_current(found.get("code")) else f" {OLDER}"
        for bar in found["bars"]:
            sign = "≥" if bar["better"] == "higher" else "≤"
            value = f"{bar['value']:,.4g}"
            if bar["standard_error"]:
                value += f" ± {bar['standard_error']:.2g}"
            if bar["outcome"] != "holds":
                value = f"**{value}**" + (" (undecided)" if bar["outcome"] == "undecided" else "")
            lines.append(f"| `{name}`{mark} | {bar['name']} | {value} | {sign} {bar['goal']:,.4g} |")
    return "\n".join(lines)


def results_of(names: str) -> str:
    """A table row for each result: benchmark, outcome of its bars, commit, date, machine, command."""
    lines = []
    for name in names.split() or sorted(path.stem for path in RESULTS.glob("*.json")):
        found = result(name)
        measured = found.get("measured", {})
        commit = (measured.get("commit") or "not recorded")[:12] + (" + changes" if measured.get("dirty") else "")
        mark = "" if is_current(found.get("code")) else f" {OLDER}"
        held = sum(bar["outcome"] == "holds" for bar in found["bars"])
        date = measured["at"][:10] if measured.get("at") else "not recorded"
        cores, processor = found["machine"]["cores"], found["machine"].get("gpu") or found["machine"]["processor"]
        bars, command = f"{held} of {len(found['bars'])}", found["command"]
        lines.append(f"| `{name}`{mark} | {bars} | {commit} | {date} | {cores} cores, {processor} | `{command}` |")
    return "\n".join(lines)


def screen_of(name: str) -> str:
    return "\n".join(["```text", *result(name.strip())["rows"][0]["screen"], "```"])


GENERATED: dict[str, Callable[[str], str]] = {"bars": bars_of, "results": results_of, "screen": screen_of}


def in_braces(match: re.Match[str]) -> str:
    kind, _, names = match[1].partition(":")
    return GENERATED[kind.strip()](names) if kind.strip() in GENERATED else value_of(match[1])


def rendered(text: str) -> str:
    """The page with every generated number updated from its result. Raises PageError."""
    if found := HTML_BLOCK.search(text):
        line = text.count("\n", 0, found.end()) + 1
        raise PageError(f"line {line} begins with a marker, which would end the paragraph; put a word before it")
    text = TABLE.sub(lambda m: m[1] + re.sub(r"\{(.*?)\}", in_braces, m[2]) + "\n" + m[4].lstrip("\n"), text)
    return NUMBER.sub(lambda m: m[1] + value_of(m[2]) + m[4], text)


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(*arguments: str) -> int:
    stale = []
    for path in pages():
        text = path.read_text()
        try:
            new = rendered(text)
        except PageError as error:
            print(f"error: {path.relative_to(ROOT)}: {error}", file=sys.stderr)
            return 2
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in arguments:
                path.write_text(new)
    if stale and "--check" in arguments:
        print(f"error: numbers are not those of benchmarks/results: {', '.join(stale)}", file=sys.stderr)
        print("hint: make pages", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
