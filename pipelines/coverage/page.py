"""`report.html`: the report as one file with pictures, which needs no other and no script.

Bars are elements with a width, so they keep their place on a phone and are read out with their numbers. It borrows the
control plane's colours and pieces (platform/server/page/base.css) and follows the system's light or dark.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moray.pipelines.coverage.domains import GENERAL, UNJUDGED
from moray.platform.server.page_files import page_file

_BASE = page_file("base.css")
_OWN = Path(__file__).with_name("page.css")
_MARK = '<span class="mark" aria-hidden="true"></span>'
_MOST_ROWS = 14
_MOST_REASONS = 6
_EVEN_AT = 4  # bars of domains end at so many even shares: what is thin can be seen beside what is huge


def coverage_page(report: dict[str, Any]) -> str:
    """HTML of a report (summary.py), self-contained."""
    cards = [
        _thin(report),
        _stages(report["stages"]),
        _domains(report),
        _kept(report),
        '<div class="columns even">',
        _bars("Sources", report["source"]),
        _bars("Languages", report["language"]),
        "</div>",
        _bars("Quality", report["quality"]) if report["quality"] else "",
        _numbers(report),
    ]
    first, last = report["stages"][0], report["stages"][-1]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report["title"])}</title>
<link rel="icon" href="data:,">
<style>
{_css()}</style>
</head>
<body>
<main>
<header class="heading">
<h1>{escape(report["title"])}</h1>
<p class="sum"><span><b>{_short(last["tokens"])}</b> tokens</span><span>of {_short(first["tokens"])}</span>
<span><b>{last["documents"]:,}</b> documents</span><span>{escape(report["tokens"])}</span></p>
</header>
<div class="stack">
{"".join(cards)}
</div>
</main>
</body>
</html>
"""


def _css() -> str:
    return re.sub(r"@font-face \{.*?\}\n", "", _BASE.read_text()) + _OWN.read_text()


def _thin(report: dict[str, Any]) -> str:
    least, even = report["thin_below"], report["even_share"]
    limit = f"{_percent(least)} of an even share ({_short(least * even)} tokens)"
    if not report["thin"]:
        return _card("Thin domains", "", f"<p>None: every domain has at least {limit}.</p>")
    rows = "".join(
        f"<li>{_MARK}<b>{escape(one['domain'])}</b>"
        f'<span class="dim">{_percent(one["of_even_share"])} of an even share</span>'
        "</li>"
        for one in report["thin"]
    )
    note = f"less than {limit}: a model guesses where it has read little"
    return _card("Thin domains", note, f'<ul class="thin">{rows}</ul>')


def _stages(stages: Sequence[dict[str, Any]]) -> str:
    """A bar for each stage: what it kept, and behind it what it dropped, with the reasons below."""
    whole = max([1, *(stage["tokens"] for stage in stages)])
    rows = []
    for number, stage in enumerate(stages):
        before = stages[number - 1]["tokens"] if number else stage["tokens"]
        lost = max(0, before - stage["tokens"])
        said = f"{stage['stage']}: {_short(stage['tokens'])} tokens, {_short(lost)} dropped"
        rows.append(
            f'<div class="bar-row"><span class="bar-name">{escape(stage["stage"])}</span>'
            f'<span class="track" role="img" aria-label="{escape(said)}">'
            f"{_part('kept', stage['tokens'] / whole)}{_part('lost', lost / whole)}</span>"
            f'<span class="bar-value"><b>{_short(stage["tokens"])}</b>'
            f'<span class="dim">{_percent(stage["tokens"] / whole)}</span></span></div>{_reasons(stage["dropped"])}'
        )
    return _card("Stages", "tokens kept, and dropped at that stage", "".join(rows))


def _reasons(dropped: Sequence[dict[str, Any]]) -> str:
    if not dropped:
        return ""
    shown = list(dropped[:_MOST_REASONS])
    if rest := sum(one["documents"] for one in dropped[_MOST_REASONS:]):
        tokens = sum(one["tokens"] for one in dropped[_MOST_REASONS:])
        shown.append({"reason": _others(len(dropped) - _MOST_REASONS), "documents": rest, "tokens": tokens})
    chips = "".join(
        f"<li>{escape(one['reason'].replace('_', ' '))} <b>{one['documents']:,}</b>"
        + (f' <span class="dim">{_short(one["tokens"])} tokens</span>' if one["tokens"] else "")
        + "</li>"
        for one in shown
    )
    return f'<ul class="reasons" aria-label="documents dropped, by reason">{chips}</ul>'


def _domains(report: dict[str, Any]) -> str:
    """Bars up to four even shares, with the even share and the limit of what is thin as lines."""
    outside = (GENERAL, UNJUDGED)
    rows = [row for row in report["domain"] if row["name"] not in outside]
    thin = {one["domain"] for one in report["thin"]}
    even = max(1, report["even_share"])
    end = min(_EVEN_AT * even, max([1, *(max(row["tokens"]) for row in rows)]))
    lines = [("even share", even / end), ("thin", report["thin_below"] * even / end)]
    marks = "".join(f'<i class="rule {name.split()[0]}" style="left:{at:.2%}"></i>' for name, at in lines if at <= 1)
    body = "".join(_bar(row, end, marks, row["name"] in thin, _times(row["tokens"][-1] / even)) for row in rows)
    rest = " and ".join(
        f"{_short(row['tokens'][-1])} of {'no domain' if row['name'] == GENERAL else 'other languages'}"
        for row in report["domain"]
        if row["name"] in outside and row["tokens"][-1]
    )
    key = (
        '<p class="key"><span><i class="swatch kept"></i>after the last stage</span>'
        '<span><i class="swatch ghost"></i>at the first stage</span>'
        '<span><i class="swatch even"></i>even share</span><span><i class="swatch thin"></i>thin below</span></p>'
    )
    said = "Found by words that are at home in each, so rough" + (f"; besides, {rest}." if rest else ".")
    return _card("Domains", "tokens, and part of an even share", f'{body}{key}<p class="dim">{escape(said)}</p>')


def _bars(title: str, rows: Sequence[dict[str, Any]]) -> str:
    shown = list(rows[:_MOST_ROWS])
    if rest := rows[_MOST_ROWS:]:
        shown.append({"name": _others(len(rest)), "tokens": _sums(row["tokens"] for row in rest)})
    end = max([1, *(max(row["tokens"]) for row in shown)])
    whole = max(1, sum(row["tokens"][-1] for row in rows))
    return _card(title, "", "".join(_bar(row, end, "", False, _percent(row["tokens"][-1] / whole)) for row in shown))


def _bar(row: dict[str, Any], end: float, marks: str, thin: bool, share: str) -> str:
    first, last = row["tokens"][0], row["tokens"][-1]
    said = (
        f"{row['name']}: {_short(last)} tokens, {share}{', thin' if thin else ''}; {_short(first)} at the first stage"
    )
    over = '<i class="over" aria-hidden="true"></i>' if last > end else ""
    return (
        f'<div class="bar-row{" is-thin" if thin else ""}"><span class="bar-name">'
        f"{_MARK if thin else ''}{escape(row['name'])}</span>"
        f'<span class="track" role="img" aria-label="{escape(said)}">'
        f'<i class="ghost" style="width:{min(1, first / end):.2%}"></i>'
        f'<i class="kept" style="width:{min(1, last / end):.2%}"></i>{marks}{over}</span>'
        f'<span class="bar-value"><b>{_short(last)}</b><span class="dim">{share}</span></span></div>'
    )


def _kept(report: dict[str, Any]) -> str:
    """A cell for each domain and stage: which part of the first stage's tokens is still there, red for what is not."""
    stages = [stage["stage"] for stage in report["stages"]]
    rows = [row for row in report["domain"] if row["tokens"][0]]
    if len(stages) < 2 or not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(stage)}</th>' for stage in stages[1:])
    body = "".join(
        f'<tr><th scope="row">{escape(row["name"])}</th>'
        + "".join(_cell(tokens / row["tokens"][0]) for tokens in row["tokens"][1:])
        + "</tr>"
        for row in rows
    )
    rows_of = f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>"
    table = f'<div class="scroll"><table class="heat">{rows_of}</table></div>'
    return _card("What each stage left of a domain", "of the tokens at the first stage", table)


def _cell(share: float) -> str:
    lost = max(0.0, 1 - share)
    return f'<td style="--lost:{lost:.0%}"{" class=strong" if lost > 0.55 else ""}>{_percent(share)}</td>'


def _numbers(report: dict[str, Any]) -> str:
    """All numbers as tables, for who would rather read."""
    stages = [stage["stage"] for stage in report["stages"]]
    head = "".join(f'<th scope="col" class="number">{escape(stage)}</th>' for stage in stages)
    tables = []
    for kind in ("source", "language", "domain", "quality"):
        body = "".join(
            f'<tr><th scope="row">{escape(row["name"])}</th>'
            + "".join(f'<td class="number">{tokens:,}</td>' for tokens in row["tokens"])
            + "</tr>"
            for row in report[kind]
        )
        if body:
            tables.append(
                f'<div class="scroll"><table><caption>Tokens by {kind}</caption><thead><tr><td></td>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>"
            )
    return f'<details class="card"><summary>All numbers</summary>{"".join(tables)}</details>'


def _card(title: str, note: str, body: str) -> str:
    said = f'<span class="dim">{escape(note)}</span>' if note else ""
    return f'<section class="card"><div class="card-head"><h2>{escape(title)}</h2>{said}</div>{body}</section>\n'


def _part(name: str, share: float) -> str:
    return f'<i class="part {name}" style="width:{share:.2%}"></i>' if share else ""


def _others(count: int) -> str:
    return f"{count} other{'s' if count > 1 else ''}"


def _sums(rows: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{share:.0%}".replace("%", " %") if share >= 0.095 or not share else f"{share:.1%}".replace("%", " %")


def _times(share: float) -> str:
    """Of an even share: 17 %, but 3.2 x."""
    return _percent(share) if share < 2 else f"{share:.2g} \u00d7" if share < 10 else f"{share:.0f} \u00d7"


def _short(count: float) -> str:
    """1234567 as 1.23 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}" if count < 999.5 * limit else f"{count / limit:.0f} {unit}"
    return f"{count:.0f}"
