"""`moray models`: models from elsewhere."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from moray.platform.run.console import Json, err, out, print_json

app = App(name="models", help="Bring in models from elsewhere.", help_format="plaintext")


@app.command(name="import")
def import_(
    path: Path,
    /,
    *,
    name: Annotated[str | None, Parameter(help="its name here (default: the folder's)")] = None,
    precision: Annotated[Literal["as-is", "float32", "bf16", "fp8"], Parameter(help="as-is keeps every bit")] = "as-is",
    json_: Json = False,
) -> int:
    """Bring in a model in the Hugging Face DeepSeek-V3 layout, as NAME@newest, for serving or continued pretraining.

    Every tensor is checked first; one that is missing, extra, misshapen or not finite is named.
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
