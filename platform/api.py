"""The Python equivalent of the command line: `plan`, `run`, `serving`.

This module imports packages above the platform lazily, inside functions: `moray.cluster.embedded` to run on and
`moray.pipelines.serve` to serve with.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moray.platform.control.jobs import Job, Submission
from moray.platform.control.profiles import Profile, load_profile
from moray.platform.control.remote_run import run_on_cluster
from moray.platform.control.upload import upload_files
from moray.platform.core.api_keys import check_guarded, served_keys
from moray.platform.core.cluster import BackendUnreachableError, Cluster, Usage
from moray.platform.core.errors import InputError, StepFailed, nearest
from moray.platform.core.events import Event
from moray.platform.core.home import Home
from moray.platform.core.ports import check_port, free_port
from moray.platform.core.serve_options import ServeOptions
from moray.platform.plan.memory import MemoryRequest, Progress, StepMemoryPlan
from moray.platform.plan.recipe import Recipe, load_recipe, parse_recipe
from moray.platform.run.doctor import Finding, require_resources
from moray.platform.run.runner import Decision, Runner, plan_steps
from moray.platform.run.step_run import RunResult
from moray.platform.store.aliases import NEWEST
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.search import find_artifact

if TYPE_CHECKING:
    from moray.pipelines.serve.session import ServingSession
    from moray.pipelines.tasks.intervals import Comparison

_log = logging.getLogger("moray")
_KEYS_SECONDS = 1.0  # between looks at the keys while a model is served
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def open_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe by path, or by name if it ships with Moray. Raises InputError or RecipeError."""
    try:
        Path.cwd()
    except FileNotFoundError as error:  # Python can run without one, the processes that Ray starts cannot
        raise InputError("the current folder no longer exists", "change to a folder that exists") from error
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        shipped = {p.stem: p for p in RECIPES.glob("*.yaml")}
        if str(recipe) not in shipped:
            raise InputError(f"unknown recipe {str(recipe)!r}", nearest(str(recipe), shipped))
        path = shipped[str(recipe)]
    return load_recipe(path, overrides)


def plan(recipe: str | Path, overrides: Sequence[str] = (), home: Home | None = None) -> list[Decision]:
    """Decides for each step, in order, whether a run would execute or reuse it. Starts and writes nothing."""
    home = home or Home.from_environment()
    return plan_steps(open_recipe(recipe, overrides), ArtifactStore(home), embedded_cluster(home).topology())


def memory_plans(
    recipe: str | Path, overrides: Sequence[str], request: MemoryRequest, progress: Progress
) -> list[StepMemoryPlan]:
    """The memory that a rank of each training step, or of the step of the request, would need. Starts nothing.

    Raises InputError for a step that the recipe does not have.
    """
    opened = open_recipe(recipe, overrides)
    keys = [planned.key for planned in opened.steps]
    if request.step not in (None, *keys):
        raise InputError(f"--step: {opened.name} has no step {request.step!r}", nearest(str(request.step), keys))
    chosen = [planned for planned in opened.steps if request.step in (None, planned.key)]
    plans = (planned.step.memory(planned, opened, request, progress) for planned in chosen)
    return [one for one in plans if one is not None]


def run(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    cpus: int | None = None,
    home: Home | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> RunResult:
    """Runs a recipe on an embedded Ray cluster, which stops when the run ends."""
    home = home or Home.from_environment()
    opened = open_recipe(recipe, overrides)
    require_resources()
    return Runner(home, embedded_cluster(home, cpus), list(listeners)).run(opened)


def explain_document(document: str, run: str | None = None, home: Home | None = None) -> Any:
    """Traces a document, given by id or SOURCE/KEY, through the steps of a run
    (`pipelines/shared/document_history.py`). Raises InputError if no run contains it."""
    from moray.pipelines.shared.document_history import explain_in

    return explain_in(home or Home.from_environment(), document, run)


def import_model(
    path: str | Path,
    name: str | None = None,
    precision: str = "as-is",
    *,
    chat_template: Path | None = None,
    home: Home | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> tuple[str, Artifact]:
    """Imports a model in the Hugging Face layout; returns its alias, `NAME@newest`, and its artifact.

    precision: "as-is", "float32", "bf16" or "fp8". chat_template: a file to use instead of the model's own. Importing
    the same model again reuses the first copy. Raises InputError that names the problem if the model is invalid.
    """
    home = home or Home.from_environment()
    folder = Path(path).expanduser().absolute()
    name = name or re.sub(r"[^a-z0-9_-]+", "-", folder.name.lower()).strip("-_")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise InputError(f"model name {name!r} may contain only a-z, 0-9, - and _", "set another with --name")
    config = {"path": str(folder), "precision": precision}
    if chat_template is not None:
        config["chat_template"] = str(chat_template.expanduser().absolute())
    step = {"uses": "import-model", "with": config}
    recipe = parse_recipe(yaml.safe_dump({"name": name, "steps": {"import": step}}), Path(f"import of {folder.name}"))
    result = Runner(home, embedded_cluster(home), list(listeners)).run(recipe)
    artifact = result.steps["import"].artifact
    ArtifactStore(home).aliases.set(name, NEWEST, artifact.reference)
    return f"{name}@{NEWEST}", artifact


def chat_template(model: str, *, home: Home | None = None) -> str | None:
    """The source of a model's chat template; None if it has none. Raises InputError."""
    from moray.pipelines.serve.chat_template import ChatTemplate, ChatTemplateError

    folder = model_folder(model, home or Home.from_environment())
    try:
        found = ChatTemplate.load(folder, {})
    except ChatTemplateError as error:
        raise InputError(f"{model}: {error}", "give the model another one: moray models template MODEL FILE") from error
    return found.source if found else None


def give_chat_template(
    model: str,
    template: str | Path,
    name: str | None = None,
    *,
    home: Home | None = None,
    listeners: Sequence[Callable[[Event], None]] = (),
) -> tuple[str, Artifact]:
    """Makes a model with another chat template, which shares the weights where the disk allows it; returns its alias,
    `NAME@newest`, and its artifact.

    template: a file with Jinja, or "plain" for Moray's form of a dialogue. name: by default that of the model. Raises
    InputError.
    """
    from moray.pipelines.serve.chat_template import ChatTemplate, ChatTemplateError
    from moray.pipelines.shared.chat_files import PLAIN_CHAT

    home = home or Home.from_environment()
    folder = model_folder(model, home)
    file = PLAIN_CHAT if template == "plain" else Path(template).expanduser()
    try:
        ChatTemplate({"default": file.read_text("utf-8")}, {})
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}", "name a file with a Jinja template, or `plain`") from error
    except (ChatTemplateError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {error}", "correct the file") from error
    name = name or (model.partition("@")[0] if "@" in model else None)
    return import_model(folder, name, chat_template=file, home=home, listeners=listeners)


def compare_models(first: str, second: str, *, home: Home | None = None) -> dict[tuple[str, str], Comparison]:
    """Compares two evaluations of tasks item by item, by (task, metric). first, second: their artifacts.
    Raises InputError."""
    from moray.pipelines.tasks.compare import compare_evaluations

    store = ArtifactStore(home or Home.from_environment())
    folders = []
    for reference in (first, second):
        artifact = find_artifact(store, reference)
        if artifact.manifest.step not in ("evaluate-tasks", "evaluate-harness"):
            raise InputError(
                f"{reference!r} is made by {artifact.manifest.step}",
                "name two artifacts of `evaluate-tasks` or `evaluate-harness`",
            )
        folders.append(store.fetch(artifact).folder)
    return compare_evaluations(*folders)


@contextmanager
def serving(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    cpus: int | None = None,
    options: ServeOptions | None = None,
    home: Home | None = None,
) -> Iterator[str]:
    """Serves a model over HTTP for the duration of the block; yields the URL once the server accepts requests.

    `port` 0 picks a free port. `cpus`: of the embedded Ray. On exit, open requests are finished, then the embedded Ray
    is stopped. Resource requests that Ray cannot place are logged as warnings.
    """
    from moray.pipelines.serve.session import open_session

    home = home or Home.from_environment()
    check_port(host, port)
    check_guarded(home, host)
    folder = model_folder(model, home)
    require_resources()
    cluster = embedded_cluster(home, cpus)
    cluster.on_pending = cluster.on_unsatisfiable = logging.getLogger("moray").warning
    port = port or free_port(host)
    try:
        gpus = cluster.ensure().gpus
        session = open_session(folder, model_name(model, folder), host, port, options, gpus, served_keys(home))
        if session.notice:
            _log.warning(session.notice)
        try:
            with _follow_keys(home, session):
                yield session.url
        finally:
            session.stop()
    finally:
        cluster.stop()


@contextmanager
def _follow_keys(home: Home, session: ServingSession) -> Iterator[None]:
    """Tells the server of keys that are made or revoked during the block."""
    ended, told = threading.Event(), served_keys(home)

    def follow() -> None:
        nonlocal told
        while not ended.wait(_KEYS_SECONDS):
            try:
                if (keys := served_keys(home)) != told:
                    session.accept_keys(keys or [])
                    told = keys
            except Exception as error:
                _log.warning("the keys are still those of before: %s", error)

    thread = threading.Thread(target=follow, name="keys", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def model_folder(model: str, home: Home) -> Path:
    """The Hugging Face folder behind an alias (`NAME` stands for `NAME@newest`), an artifact or a path. Raises
    InputError."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path} has no config.json", "give a folder in the Hugging Face layout")
        return path
    if model.startswith(("/", ".", "~")):
        raise InputError(f"there is no folder {path}", "give a folder in the Hugging Face layout, or NAME@newest")
    store = ArtifactStore(home)
    newest = f"{model}@{NEWEST}"
    artifact = find_artifact(store, newest if newest in store.aliases.all() else model)
    if artifact.manifest.produces != "model":
        raise InputError(
            f"{model!r} is an artifact of kind {artifact.manifest.produces!r}, not a model", "name an `export` artifact"
        )
    return store.fetch(artifact).folder


def model_name(model: str, folder: Path) -> str:
    """The name a model is served under: the alias without its version, or the folder's name."""
    named = "@" in model or not ("/" in model or Path(model).expanduser().is_dir())
    return model.partition("@")[0] if named else folder.name


def run_on(
    profile: Profile,
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    show: Callable[[str], None],
    warn: Callable[[str], None],
    progress: Callable[[str, float, float], None] | None = None,
    yes: bool = False,
    home: Home | None = None,
) -> Job:
    """Runs a recipe on an existing Ray cluster, and returns the ended job. Needs no control plane.

    show: gets new text of the driver's log. warn: gets reasons to wait. progress: of the upload of the recipe's files.
    yes: upload them even if they are larger than 1 GB.
    """
    from moray.cluster.managed import open_cluster

    opened, cluster = open_recipe(recipe, overrides), open_cluster(profile)
    if reason := why_absent(profile):
        raise InputError(f"{profile.address}: {reason}", "start Ray's head, or correct `address`")
    submission = Submission(
        source=opened.source,
        path=str(opened.path),
        folder=str(Path.cwd()),
        overrides=list(overrides),
        cluster=cluster.name,
        stored=upload_files(opened, profile, yes, progress),
    )
    return run_on_cluster(home or Home.from_environment(), cluster, submission, show, warn)


def why_absent(profile: Profile) -> str:
    """Why the cluster of a profile does not respond; "" if it does. Raises InputError if it responds but cannot run
    jobs until a person changes something: it refuses the token, it is not Ray, or it has another version of Ray."""
    from moray.cluster.existing import ExistingJobs

    try:
        ExistingJobs(profile).check()
    except BackendUnreachableError as error:
        return str(error)
    return ""


def check_cluster(name: str, home: Home | None = None) -> Iterator[Finding]:
    """Yields what may keep jobs from running on the cluster of a profile. Runs one short job on it. Raises InputError
    for an unknown cluster or a wrong profile."""
    from moray.cluster.check import examine_cluster

    return examine_cluster(load_profile(home or Home.from_environment(), name))


def cluster_hosts(name: str, home: Home | None = None) -> tuple[str, Usage]:
    """The address of a profile's cluster, and its hosts. Raises InputError, StepFailed if it does not respond."""
    from moray.cluster.managed import find_cluster

    found = find_cluster(home or Home.from_environment(), name)
    try:
        return found.where, found.backend.usage()
    except BackendUnreachableError as error:
        raise StepFailed(f"{found.where}: {error}", f"moray cluster check {name}") from error


def embedded_cluster(home: Home, cpus: int | None = None) -> Cluster:
    from moray.cluster.embedded import EmbeddedCluster

    return EmbeddedCluster(home, cpus)
