"""`moray models`: import models, give them chat templates, and compare them."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from moray.platform.core.errors import InputError
from moray.platform.run.console import Json, err, out, print_json, print_table

if TYPE_CHECKING:
    from moray.platform.store.artifacts import Artifact

app = App(name="models", help="Import models, give them chat templates, compare them.", help_format="plaintext")


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
    return _print_model(alias, artifact, json_)


@app.command
def template(
    model: str,
    file: str | None = None,
    /,
    *,
    name: Annotated[str | None, Parameter(help="name of the new model (default: that of MODEL)")] = None,
    json_: Json = False,
) -> int:
    """Show a model's chat template, or make a model with another one as NAME@newest.

    MODEL is an alias, an artifact or a folder. FILE has the template in Jinja, as transformers reads it; `plain` is
    Moray's form of a dialogue, for models that were not trained to chat. The new model shares the weights of MODEL.
    """
    from moray.platform.api import chat_template, give_chat_template
    from moray.platform.run.terminal import Terminal

    if file is None:
        source = chat_template(model)
        if json_:
            print_json({"chat_template": source})
        elif source is None:
            raise InputError(f"{model} has no chat template", f"give it one: moray models template {model} FILE|plain")
        else:
            out().print(source, markup=False, highlight=False, soft_wrap=True)
        return 0
    with Terminal(err()) as terminal, redirect_stdout(sys.stderr):
        alias, artifact = give_chat_template(model, file, name, listeners=[terminal])
    return _print_model(alias, artifact, json_)


@app.command
def compare(first: str, second: str, /, *, json_: Json = False) -> int:
    """Compare two models item by item: FIRST and SECOND are evaluations of the same tasks.

    Prints the difference with its 95 % interval, and p of McNemar's exact test.
    """
    from moray.platform.api import compare_models

    found = compare_models(first, second)
    if json_:
        print_json([{"task": task, "metric": metric, **asdict(one)} for (task, metric), one in found.items()])
        return 0
    rows = [
        [
            task,
            metric,
            f"{one.n:,}",
            f"{one.first:.1%}",
            f"{one.second:.1%}",
            f"{one.difference:+.1%} ({one.interval[0]:+.1%} to {one.interval[1]:+.1%})",
            f"{one.only_first} : {one.only_second}",
            f"{one.p:.3f}",
        ]
        for (task, metric), one in found.items()
    ]
    names = ["task", "metric", "items>", "first>", "second>", "difference (95 %)", "only one right>", "p>"]
    print_table(names, rows)
    return 0


def _print_model(alias: str, artifact: Artifact, as_json: bool) -> int:
    if as_json:
        found = {"alias": alias, "artifact": artifact.reference, "folder": str(artifact.folder)}
        print_json({**found, "outcome": artifact.manifest.outcome})
        return 0
    out().print(f"{alias}: {artifact.manifest.outcome}", markup=False)
    out().print(f"try next: moray serve {alias}", markup=False)
    return 0
