"""The same as the command line, from Python: `plan`, `run`, `serving`.

This module reaches the rooms above the platform by name, when called: `moray.cluster.embedded` to run on and
`moray.pipelines.serve` to serve with.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from moray.platform.core.cluster import Cluster
from moray.platform.core.errors import InputError, nearest
from moray.platform.core.events import Event
from moray.platform.core.home import Home
from moray.platform.core.ports import check_port, free_port
from moray.platform.plan.recipe import Recipe, load_recipe, parse_recipe
from moray.platform.run.doctor import require_room
from moray.platform.run.mlflow_tracking import NEWEST
from moray.platform.run.runner import Decision, Runner, plan_steps
from moray.platform.run.step_run import RunResult
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.search import find_artifact

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def open_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by file, or by the name of one that ships with Moray. Raises InputError or RecipeError."""
    try:
        Path.cwd()
    except FileNotFoundError as error:  # Python does without, the processes that Ray starts do not
        raise InputError("the current folder is gone", "change to one that exists") from error
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        shipped = {p.stem: p for p in RECIPES.glob("*.yaml")}
        if str(recipe) not in shipped:
            raise InputError(f"no recipe {str(recipe)!r}", nearest(str(recipe), shipped))
        path = shipped[str(recipe)]
    return load_recipe(path, overrides)


def plan(recipe: str | Path, overrides: Sequence[str] = (), home: Home | None = None) -> list[Decision]:
    """What a run would do, in order. Starts and writes nothing."""
    home = home or Home.from_environment()
    return plan_steps(open_recipe(recipe, overrides), ArtifactStore(home), embedded_cluster(home).topology())


def run(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    cpus: int | None = None,
    home: Home | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> RunResult:
    """Runs a recipe on an embedded Ray that ends with the run."""
    home = home or Home.from_environment()
    opened = open_recipe(recipe, overrides)
    require_room()
    return Runner(home, embedded_cluster(home, cpus), list(listeners)).run(opened)


def explain_document(document: str, run: str | None = None, home: Home | None = None) -> Any:
    """What became of a document, by id or SOURCE/KEY (`pipelines/shared/document_history.py`). Raises InputError if no
    run has it."""
    from moray.pipelines.shared.document_history import explain_in

    return explain_in(home or Home.from_environment(), document, run)


def import_model(
    path: str | Path,
    name: str | None = None,
    precision: str = "as-is",
    *,
    home: Home | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> tuple[str, Artifact]:
    """Brings in a model in the Hugging Face layout; returns its alias, `NAME@newest`, and its artifact.

    precision: "as-is", "float32", "bf16" or "fp8". The same model is not copied twice. Raises InputError naming what is
    wrong with it.
    """
    home = home or Home.from_environment()
    folder = Path(path).expanduser().absolute()
    name = name or re.sub(r"[^a-z0-9_-]+", "-", folder.name.lower()).strip("-_")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise InputError(f"name {name!r} must be of a-z, 0-9, - and _", "give another with --name")
    step = {"uses": "import-model", "with": {"path": str(folder), "precision": precision}}
    recipe = parse_recipe(yaml.safe_dump({"name": name, "steps": {"import": step}}), Path(f"import of {folder.name}"))
    result = Runner(home, embedded_cluster(home), list(listeners)).run(recipe)
    artifact = result.steps["import"].artifact
    ArtifactStore(home).aliases.set(name, NEWEST, artifact.reference)
    return f"{name}@{NEWEST}", artifact


@contextmanager
def serving(
    model: str, *, host: str = "127.0.0.1", port: int = 8000, cpus: int | None = None, home: Home | None = None
) -> Iterator[str]:
    """Serves a model over HTTP while the block lasts; gives the URL once requests are answered.

    `port` 0 takes any that is free. At the end open answers are finished, then the embedded Ray is stopped. What Ray
    has no room for is logged as a warning.
    """
    from moray.pipelines.serve.deployment import deploy

    home = home or Home.from_environment()
    folder = model_folder(model, home)
    require_room()
    cluster = embedded_cluster(home, cpus)
    cluster.on_pending = cluster.on_hopeless = logging.getLogger("moray").warning
    port = port or free_port(host)
    check_port(host, port)
    try:
        cluster.ensure()
        deployment = deploy(folder, name=model_name(model, folder), host=host, port=port)
        try:
            yield deployment.url
        finally:
            deployment.stop()
    finally:
        cluster.stop()


def model_folder(model: str, home: Home) -> Path:
    """The Hugging Face folder behind an alias, an artifact reference or a path. Raises InputError."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path} holds no config.json", "give a folder in the Hugging Face layout")
        return path
    store = ArtifactStore(home)
    artifact = find_artifact(store, model)
    if artifact.manifest.produces != "model":
        raise InputError(f"{model!r} is {artifact.manifest.produces}, not a model", "name an `export` artifact")
    return store.fetch(artifact).folder


def model_name(model: str, folder: Path) -> str:
    """The name under which a model is served: the alias without its version, or the folder's name."""
    return model.partition("@")[0] if "@" in model else folder.name


def embedded_cluster(home: Home, cpus: int | None = None) -> Cluster:
    from moray.cluster.embedded import EmbeddedCluster

    return EmbeddedCluster(home, cpus)
