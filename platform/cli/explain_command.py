"""`moray explain`: traces one document through the steps of a run."""

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
    run: Annotated[
        str | None, Parameter(help="the run to look in (default: the newest that contains the document)")
    ] = None,
    json_: Json = False,
) -> int:
    """Trace a document: its source, each step's decision about it, and the document kept in its place.

    DOCUMENT is an id (32 hex digits), or SOURCE/KEY with the source of the recipe and the path of the file, for example
    `code/json/decoder.py`.
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
