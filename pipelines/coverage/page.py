"""`report.html`: the report as one self-contained page with charts and without scripts.

The page is the template report.html.jinja; this module computes its charts. Bars are elements with a width, so they
adapt to narrow screens, and screen readers read their numbers. The page uses the style sheet of the control plane
(platform/server/page/base.css) and follows the system's light or dark mode.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from moray.pipelines.coverage.domains import GENERAL, NOT_ENGLISH
from moray.platform.server.page_files import page_file

_BASE = page_file("base.css")
_OWN = Path(__file__).with_name("page.css")
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_MOST_ROWS = 14
_MOST_REASONS = 6
_MAX_EVEN_SHARES = 4  # full width of domain bars, in even shares, so that low coverage is visible beside large domains

Json = dict[str, Any]


@dataclass(frozen=True)
class CoverageBar:
    """The bar of one source, language, domain or quality band. first_width, last_width: 0 .. 1, at the first and the
    last stage. too_long: it has more tokens than the bar shows. label: for screen readers."""

    name: str
    tokens: int
    share: str
    first_width: float
    last_width: float
    too_long: bool
    thin: bool
    label: str


@dataclass(frozen=True)
class CoverageStage:
    """The bar of a stage: kept and dropped tokens, and their widths, 0 .. 1. dropped: by reason."""

    name: str
    tokens: int
    lost: int
    kept_width: float
    lost_width: float
    dropped: list[Json]


@dataclass(frozen=True)
class BarLine:
    """A line across bars: its name, and its position, 0 .. 1."""

    name: str
    at: float


@dataclass(frozen=True)
class HeatRow:
    """A domain, and the share of its tokens at the first stage that is left after each later stage."""

    name: str
    left: list[float]


def coverage_page(report: Json) -> str:
    """The self-contained HTML page of a report (summary.py)."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "short": _short,
        "percent": _percent,
        "whole_percent": lambda share: f"{share:.0%}",
        "width": lambda share: f"{share:.2%}",
        "grouped": lambda count: f"{count:,}",
    }
    domains, lines = _domains(report)
    page = environment.from_string(_TEMPLATE.read_text()).render(
        report=report,
        css=_css(),
        thin_tokens=report["thin_below"] * report["even_share"],
        stages=_stages(report["stages"]),
        domains=domains,
        lines=lines,
        outside=_outside(report["domain"]),
        heat=_heat(report),
        sources=_bars(report["source"]),
        languages=_bars(report["language"]),
        qualities=_bars(report["quality"]),
    )
    return re.sub(r"\n{2,}", "\n", page).lstrip() + "\n"


def _css() -> str:
    return re.sub(r"@font-face \{.*?\}\n", "", _BASE.read_text()) + _OWN.read_text()


def _stages(stages: Sequence[Json]) -> list[CoverageStage]:
    whole = max([1, *(stage["tokens"] for stage in stages)])
    found = []
    for before, stage in zip([stages[0], *stages], stages, strict=False):
        tokens = stage["tokens"]
        lost = max(0, before["tokens"] - tokens)
        reasons = _first_reasons(stage["dropped"])
        found.append(CoverageStage(stage["stage"], tokens, lost, tokens / whole, lost / whole, reasons))
    return found


def _first_reasons(dropped: Sequence[Json]) -> list[Json]:
    """The first few reasons, and the sum of the others if they dropped any document."""
    shown, others = list(dropped[:_MOST_REASONS]), dropped[_MOST_REASONS:]
    if documents := sum(one["documents"] for one in others):
        tokens = sum(one["tokens"] for one in others)
        shown.append({"reason": _others(len(others)), "documents": documents, "tokens": tokens})
    return shown


def _domains(report: Json) -> tuple[list[CoverageBar], list[BarLine]]:
    """The bars of domains, and lines at the even share and at the limit of low coverage."""
    rows = [row for row in report["domain"] if row["name"] not in (GENERAL, NOT_ENGLISH)]
    thin = {one["domain"] for one in report["thin"]}
    even = max(1, report["even_share"])
    end = min(_MAX_EVEN_SHARES * even, _longest(rows))
    lines = [BarLine("even", even / end), BarLine("thin", report["thin_below"] * even / end)]
    bars = [_bar(row, end, _times(row["tokens"][-1] / even), row["name"] in thin) for row in rows]
    return bars, [line for line in lines if line.at <= 1]


def _outside(rows: Sequence[Json]) -> list[tuple[str, int]]:
    """The tokens of texts without a domain, by kind."""
    names = {GENERAL: "general text", NOT_ENGLISH: "other languages"}
    return [(names[row["name"]], row["tokens"][-1]) for row in rows if row["name"] in names and row["tokens"][-1]]


def _heat(report: Json) -> list[HeatRow]:
    """The rows of the heat map; empty if there is only one stage."""
    rows = [row for row in report["domain"] if row["tokens"][0]] if len(report["stages"]) > 1 else []
    return [HeatRow(row["name"], [tokens / row["tokens"][0] for tokens in row["tokens"][1:]]) for row in rows]


def _bars(rows: Sequence[Json]) -> list[CoverageBar]:
    """The first rows, and the sum of the others."""
    shown, others = list(rows[:_MOST_ROWS]), rows[_MOST_ROWS:]
    if others:
        shown.append({"name": _others(len(others)), "tokens": _sums(row["tokens"] for row in others)})
    end = _longest(shown)
    whole = max(1, sum(row["tokens"][-1] for row in rows))
    return [_bar(row, end, _percent(row["tokens"][-1] / whole)) for row in shown]


def _bar(row: Json, end: float, share: str, thin: bool = False) -> CoverageBar:
    """The bar of a row. end: the tokens of a bar of full width."""
    name, first, last = row["name"], row["tokens"][0], row["tokens"][-1]
    low = ", low coverage" if thin else ""
    label = f"{name}: {_short(last)} tokens, {share}{low}; {_short(first)} at the first stage"
    return CoverageBar(name, last, share, min(1, first / end), min(1, last / end), last > end, thin, label)


def _longest(rows: Sequence[Json]) -> int:
    return max([1, *(max(row["tokens"]) for row in rows)])


def _others(count: int) -> str:
    return f"{count} other{'s' if count > 1 else ''}"


def _sums(rows: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{share:.0%}".replace("%", " %") if share >= 0.095 or not share else f"{share:.1%}".replace("%", " %")


def _times(share: float) -> str:
    """A multiple of an even share: 17 %, but 3.2 x."""
    return _percent(share) if share < 2 else f"{share:.2g} \u00d7" if share < 10 else f"{share:.0f} \u00d7"


def _short(count: float) -> str:
    """1234567 as 1.23 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}" if count < 999.5 * limit else f"{count / limit:.0f} {unit}"
    return f"{count:.0f}"
