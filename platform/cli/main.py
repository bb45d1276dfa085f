"""The command line. Results go to stdout, everything else to stderr; `--json` prints the result as one JSON document.

Heavy modules are imported only when a command needs them: `moray --help` loads neither Ray nor torch nor MLflow.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from moray.platform.cli import (
    artifact_commands,
    chat_command,
    cluster_commands,
    deployment_commands,
    explain_command,
    job_commands,
    key_commands,
    model_commands,
    run_commands,
    schedule_commands,
    up_commands,
)
from moray.platform.cli.first_requests import show_first_requests
from moray.platform.cli.parameters import Overrides, UploadAnyway, transfer_progress
from moray.platform.core.errors import InputError, MorayError, nearest
from moray.platform.run.console import Json, err, lenient_streams, out, print_json, print_table

app = App(
    name="moray",
    help="From raw documents to a trained and served mixture-of-experts model, from one recipe file.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
up_commands.register_up(app)
job_commands.register_jobs(app)
explain_command.register_explain(app)
deployment_commands.register_deploy(app)
chat_command.register_chat(app)
app.command(schedule_commands.app)
app.command(cluster_commands.app)
app.command(run_commands.app)
app.command(artifact_commands.app)
app.command(model_commands.app)
app.command(key_commands.app)

Cpus = Annotated[int | None, Parameter(name="--cpus", help="CPU cores to use (default: all)")]


@app.command(name="run")
def run_command(
    recipe: str,
    /,
    *,
    set_: Overrides = None,
    cpus: Cpus = None,
    cluster: Annotated[str, Parameter(help="name of an existing cluster to run on, instead of an embedded one")] = "",
    address: Annotated[str, Parameter(help="or the address of its dashboard, http://HOST:8265; needs --store")] = "",
    store: Annotated[str, Parameter(help="with --address: s3://bucket/prefix, or a folder that all hosts see")] = "",
    yes: UploadAnyway = False,
    json_: Json = False,
) -> int:
    """Run a recipe on an embedded Ray cluster, reusing steps whose artifacts exist.

    RECIPE is a file, or the name of a recipe that ships with Moray. With --cluster or --address, it runs on an existing
    Ray cluster, and this command shows its log.
    """
    if cluster or address or store:
        return _run_elsewhere(recipe, set_ or [], cluster, address, store, yes, json_)
    from moray.platform.api import run as run_recipe
    from moray.platform.run.terminal import Terminal, closing_table

    console = err()
    # Ray prints worker messages to stdout, which is reserved for the result.
    with Terminal(console) as terminal, contextlib.redirect_stdout(sys.stderr):
        result = run_recipe(recipe, set_ or [], cpus=cpus, listeners=[terminal])
    if json_:
        print_json(_run_as_json(result))
        return 0
    console.print()
    out().print(closing_table(result))
    _print_closings(result)
    out().print("\nartifacts", style="bold")
    for row in result.steps.values():
        local = row.artifact.folder.exists()
        out().print(f"  {row.key:<12} {row.artifact.folder if local else 'in the shared root'}", markup=False)
    out().print(f"  {'run':<12} {result.folder}", markup=False)
    _suggest(result, recipe)
    return 0


def _run_elsewhere(
    recipe: str, overrides: list[str], cluster: str, address: str, store: str, yes: bool, json_: bool
) -> int:
    """Runs a recipe on an existing cluster. Returns the exit code of the job."""
    from moray.platform.api import run_on
    from moray.platform.control.profiles import load_profile, new_profile
    from moray.platform.core.home import Home

    if bool(cluster) == bool(address) or (bool(address) != bool(store)):
        raise InputError("give --cluster NAME, or both --address and --store", "moray cluster list")
    profile = load_profile(Home.from_environment(), cluster) if cluster else new_profile(address, store)
    with transfer_progress() as progress:
        job = run_on(
            profile,
            recipe,
            overrides,
            show=lambda text: out().print(text, end="", markup=False, highlight=False) if not json_ else None,
            warn=lambda text: err().print(text, markup=False),
            progress=progress,
            yes=yes,
        )
    if json_:
        print_json(job.as_json())
    err().print(f"{job.id}  {job.state}  {job.reason}".rstrip(), markup=False)
    return {"succeeded": 0, "cancelled": 130}.get(job.state, 1)


@app.command(name="plan")
def plan_command(
    recipe: str,
    /,
    *,
    memory: Annotated[bool, Parameter(help="show the memory that each rank of a training step would need")] = False,
    world: Annotated[int | None, Parameter(help="with --memory: number of ranks (default: the recipe's)")] = None,
    gpu: Annotated[str | None, Parameter(help="with --memory: the GPU of each rank (default: h100-80gb)")] = None,
    imbalance: Annotated[
        float | None,
        Parameter(help="with --memory: rows at the busiest rank's experts over the mean of all ranks (default: 1)"),
    ] = None,
    step: Annotated[str | None, Parameter(help="with --memory: plan this step only")] = None,
    set_: Overrides = None,
    json_: Json = False,
) -> int:
    """Show for each step whether a run would execute or reuse it, and why. Starts and writes nothing.

    With --memory, show the bytes of one rank of each training step by part, from the real code without data. Exit 1 if
    a step does not fit.
    """
    from moray.platform.api import plan as plan_recipe

    if memory:
        from moray.platform.cli.memory_table import show_memory
        from moray.platform.plan.memory import MemoryRequest

        busiest = 1.0 if imbalance is None else imbalance
        if not 1 <= busiest < math.inf or (world is not None and world < 1):
            raise InputError("--imbalance and --world must be numbers of at least 1")
        request = MemoryRequest(gpu or "h100-80gb", world, busiest, step)
        return show_memory(recipe, set_ or [], request, json_)
    if (world, gpu, imbalance, step) != (None, None, None, None):
        raise InputError("--world, --gpu, --imbalance and --step are options of --memory", "add --memory")
    decisions = plan_recipe(recipe, set_ or [])
    if json_:
        rows = [
            {
                "step": d.planned.key,
                "uses": d.planned.step.name,
                "fingerprint": d.address.fingerprint,
                "action": "reuse" if d.reuse else "run",
                "why": d.why,
                "placement": d.placement,
            }
            for d in decisions
        ]
        print_json(rows)
        return 0
    shown = [(d.planned.key, "reuse" if d.reuse else "run", d.address.fingerprint[:8], _why(d)) for d in decisions]
    print_table(("step", "action", "fingerprint", "why"), shown)
    return 0


def _why(decision: Any) -> str:
    return f"{decision.why}; {decision.placement}" if decision.placement else str(decision.why)


@app.command
def serve(
    model: str,
    /,
    *,
    host: Annotated[str, Parameter(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="port to listen on")] = 8000,
    cpus: Cpus = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="auto: a GPU if there is one")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Parameter(help="of weights; auto: bfloat16 on a GPU, float32 on a CPU. FP8 weights stay FP8 on a GPU"),
    ] = "auto",
    quantize: Annotated[Literal["", "int8"], Parameter(help="on CPUs: INT8 weights, a scale per output")] = "",
    cache_bytes: Annotated[
        str, Parameter(help="memory of the cache, such as 8GB (default: as needed, up to half of what is free)")
    ] = "",
    max_running: Annotated[int, Parameter(help="sequences that decode at the same time, in each replica")] = 256,
    threads: Annotated[int, Parameter(help="CPU threads of each replica")] = 1,
    replicas: Annotated[int, Parameter(help="copies of the model that share the requests")] = 1,
) -> int:
    """Serve a model over an OpenAI-compatible HTTP API until Ctrl-C, which finishes open requests first.

    MODEL is an alias (`quickstart@newest`), an artifact (`export/FINGERPRINT`), or a folder in the Hugging Face
    DeepSeek-V3 layout.
    """
    import threading

    from moray.platform.api import serving
    from moray.platform.core.interrupts import until_interrupted
    from moray.platform.core.serve_options import ServeOptions
    from moray.platform.core.units import parse_size

    size = parse_size(cache_bytes) if cache_bytes else 0
    options = ServeOptions(
        device, dtype, quantize, cache_bytes=size, max_running=max_running, threads=threads, replicas=replicas
    )
    try:
        with until_interrupted(), serving(model, host=host, port=port, cpus=cpus, options=options) as url:
            _announce(url, model)
            threading.Event().wait()
    except KeyboardInterrupt:  # the normal way to stop
        err().print("stopped")
    return 0


@app.command
def doctor(*, json_: Json = False) -> int:
    """Check this machine against Moray's requirements. Exit with 1 if something will not work."""
    from moray.platform.run.doctor import as_json, examine, report_lines

    findings = examine()
    if json_:
        print_json(as_json(findings))
    else:
        for line in report_lines(findings):
            out().print(line, markup=False)
    return 1 if any(finding.state == "fail" for finding in findings) else 0


@app.command
def completion(shell: Literal["bash", "zsh", "fish"], /) -> int:
    """Print the completion script of a shell. Usage in bash: eval "$(moray completion bash)"."""
    print(app.generate_completion(prog_name="moray", shell=shell))
    return 0


def _print_closings(result: Any) -> None:
    """Prints the `closing.txt` files of the steps, downloading artifacts made elsewhere. In such a file, `${artifact}`
    stands for the artifact's folder on this machine."""
    from moray.platform.core.home import Home
    from moray.platform.store.artifacts import ArtifactStore

    store = ArtifactStore(Home.from_environment())
    for row in result.steps.values():
        if any(file.path == "closing.txt" for file in row.artifact.manifest.files):
            folder = store.fetch(row.artifact).folder
            text = (folder / "closing.txt").read_text().rstrip()
            out().print("\n" + text.replace("${artifact}", str(folder)), markup=False)


def _announce(url: str, model: str) -> None:
    out().print(f"serving {model} at {url}/v1   (Ctrl-C stops it)", markup=False)
    show_first_requests(f"{url}/v1", "default")


def _run_as_json(result: Any) -> dict[str, Any]:
    return {
        "run": result.run,
        "recipe": result.recipe,
        "folder": str(result.folder),
        "seconds": round(result.seconds, 3),
        "steps": [
            {
                "step": row.key,
                "uses": row.step,
                "reused": row.reused,
                "seconds": round(row.seconds, 3),
                "fingerprint": row.artifact.fingerprint,
                "folder": str(row.artifact.folder),
                "counts": row.artifact.manifest.counts,
                "outcome": row.artifact.manifest.outcome,
            }
            for row in result.steps.values()
        ],
    }


def _suggest(result: Any, recipe: str) -> None:
    """Prints up to three commands to try next. `recipe`: as given by the user, a file or a name."""
    quoted = shlex.quote(recipe)
    served = any(row.artifact.manifest.produces == "registration" for row in result.steps.values())
    command = _called_as()
    lines = [f"{command} serve {result.recipe}@newest"] if served else []
    if any(row.step == "pretrain" for row in result.steps.values()):
        lines.append(f"{command} plan {quoted} --set pretrain.steps=400   # which steps a longer training would rerun")
    lines += [f"{command} run {quoted}   # again: everything is reused", f"{command} plan {quoted}"]
    out().print("\ntry next", style="bold")
    for line in lines[:3]:
        out().print(f"  {line}", markup=False)


def _called_as() -> str:
    """The command as this shell can call it: `moray` if it is on the path, else as it was called."""
    called = Path(sys.argv[0])
    found = shutil.which("moray")
    if found and called.exists() and Path(found).samefile(called):
        return "moray"
    return os.path.relpath(called) if called.name == "moray" else "python moray.py"


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and turns errors into `error:` / `hint:` and an exit code."""
    import moray

    app.version = moray.__version__  # type: ignore[attr-defined]
    lenient_streams()
    arguments = _with_names(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_guarded(lambda: app(arguments, exit_on_error=False, print_error=False, result_action="return_value")))


def _with_names(arguments: list[str]) -> list[str]:
    """Joins `--name X` to `--name=X`, so that a job's name may look like an option (`--name --help`)."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--name":
            joined[-1] = f"--name={argument}"
        else:
            joined.append(argument)
    return joined


def _guarded(command: Callable[[], Any]) -> int:
    console = err()
    try:
        result = command()
        return result if isinstance(result, int) else 0
    except MorayError as error:
        return _print_error(console, error.message, error.hint, error.exit_code)
    except CycloptsError as error:
        return _print_error(console, *_usage(error), 2)
    except KeyboardInterrupt:
        return _print_error(console, "stopped", "run the same command again to resume", 130)
    except BrokenPipeError:
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _print_error(console, "no space left to write the output", "free disk space, or redirect the output", 1)


def _usage(error: CycloptsError) -> tuple[str, str]:
    text = " ".join(str(error).split())
    if type(error).__name__ == "UnknownCommandError" and error.unused_tokens:
        name = error.unused_tokens[0]
        within = error.app or app
        return f"unknown command {name!r}", nearest(name, [n for n in within if not n.startswith("-")])
    return text[:1].lower() + text[1:].rstrip("."), "see moray --help"


def _print_error(console: Console, message: str, hint: str, code: int) -> int:
    console.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    if hint:
        console.print(f"hint: {hint}", markup=False, soft_wrap=True)
    return code
