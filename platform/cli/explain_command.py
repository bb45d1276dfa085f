"""`moray explain`: what became of one document."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from moray.platform.run.console import Json, out, print_json


def register_explain(app: App) -> None:
    app.command(explain_command, name="explain")


def explain_command(
    document: str,
    /,
    *,
    run: Annotated[str | None, Parameter(help="by what this run decided (default: the newest that has it)")] = None,
    json_: Json = False,
) -> int:
    """Say where a document came from, what each step decided about it, and which one stays in its place.

    DOCUMENT is an id (32 hex digits), or SOURCE/KEY as the recipe and its files name it: `code/json/decoder.py`.
    """
    from dataclasses import asdict

    from moray.platform.api import explain_document

    found = explain_document(document, run)
    if json_:
        print_json(asdict(found))
        return 0
    about = found.document
    out().print(f"{found.id}  {_name(about)}  {about['bytes']:,} bytes", style="bold", markup=False)
    out().print(f"run {found.run}\n", markup=False)
    for decision in found.decisions:
        reason = decision.details.get("reason", "")
        line = f"{decision.step:<14} {decision.verdict}{': ' + reason if reason else ''}"
        out().print(
            f"{line:<40} {decision.artifact.partition('/')[2][:8]}/{decision.file} row {decision.row}", markup=False
        )
        for key, value in decision.details.items():
            if key != "reason":
                other = found.others.get(str(value))
                out().print(f"{'':<15}{key} {_shown(value)}{'  ' + _name(other) if other else ''}", markup=False)
    return 0


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _name(about: dict[str, object]) -> str:
    meta = about.get("meta")
    key = meta.get("path", "") if isinstance(meta, dict) else ""
    return f"{about['source']}/{key}"
