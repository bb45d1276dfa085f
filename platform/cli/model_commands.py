"""`moray models`: import models."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from moray.platform.run.console import Json, err, out, print_json

app = App(name="models", help="Import models.", help_format="plaintext")


@app.command(name="import")
def import_(
    path: Path,
    /,
    *,
    name: Annotated[str | None, Parameter(help="name of the model (default: the folder's name)")] = None,
    precision: Annotated[
        Literal["as-is", "float32", "bf16", "fp8"], Parameter(help="storage precision; as-is keeps every bit")
    ] = "as-is",
    json_: Json = False,
) -> int:
    """Import a model in the Hugging Face DeepSeek-V3 layout as NAME@newest, to serve it or continue pretraining.

    Checks every tensor first and reports any that is missing, unexpected, of the wrong shape, or not finite.
    """
    from moray.platform.api import import_model
    from moray.platform.run.terminal import Terminal

    with Terminal(err()) as terminal, redirect_stdout(sys.stderr):
        alias, artifact = import_model(path, name, precision, listeners=[terminal])
    if json_:
        print_json(
            {
                "alias": alias,
                "artifact": artifact.reference,
                "folder": str(artifact.folder),
                "outcome": artifact.manifest.outcome,
            }
        )
        return 0
    out().print(f"{alias}: {artifact.manifest.outcome}", markup=False)
    out().print(f"try next: moray serve {alias}", markup=False)
    return 0
