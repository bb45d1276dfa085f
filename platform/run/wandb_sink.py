"""Curves in Weights & Biases: a run for each step with metrics, with the training step as x-axis.

W&B cannot withdraw values. The id of a run there depends on the step's fingerprint alone, so a run that resumes the
step continues it, and a value for a step that the curve already has is left out. How far curves have come is in a file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import netrc
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moray.platform.core.atomic import write_json
from moray.platform.core.errors import InputError
from moray.platform.core.events import MetricEvent
from moray.platform.plan.tracking import WandbTracking
from moray.platform.run.metric_sink import MetricSink, TrackedStep, curve_name

_X = "step"


@dataclass
class _WandbRun:
    """A run in W&B. state: the file with `last`, the last training step of each curve. before: that of curves that have
    no entry. row: values of the step `at` that are not logged yet."""

    run: Any
    state: Path
    last: dict[str, int]
    before: int = 0
    at: int = 0
    row: dict[str, float] = field(default_factory=dict)


class WandbSink(MetricSink):
    title = "Weights & Biases"

    def __init__(self, config: WandbTracking, folder: Path) -> None:
        """Raises InputError if the package or the key is missing, or the folder cannot be made."""
        check_wandb(config)
        self._config, self._folder = config, folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"tracking.wandb.folder: {folder}: {error.strerror}", "set it to a folder that you can write"
            ) from error
        self._runs: dict[TrackedStep, _WandbRun] = {}

    def write(self, step: TrackedStep, event: MetricEvent) -> None:
        found = self._runs.get(step) or self._open(step)
        name = curve_name(event)
        # Values outside training are all at step 0. Only their last one counts.
        if event.at and event.at <= found.last.get(name, found.before):
            return
        if event.at != found.at or name in found.row:
            _log_row(found)
            found.at = event.at
        found.row[name] = event.value
        found.last[name] = event.at

    def flush(self) -> None:
        for found in self._runs.values():
            _log_row(found)
            write_json(found.state, found.last)

    def close(self) -> None:
        for found in self._runs.values():
            found.run.finish()

    def _open(self, step: TrackedStep) -> _WandbRun:
        import wandb

        config, run_id = self._config, wandb_id(step)
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            id=run_id,
            name=f"{step.recipe}/{step.key}",
            group=step.recipe,
            tags=list(config.tags) or None,
            config=dict(step.config),
            dir=str(self._folder),
            mode=config.mode,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                api_key=config.api_key.reveal() if config.api_key else None,
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
            ),
        )
        run.define_metric(_X)
        run.define_metric("*", step_metric=_X)
        state = self._folder / f"wandb-{run_id}.json"
        last: dict[str, int] = json.loads(state.read_text()) if state.is_file() else {}
        summary: Any = run.summary
        # Another host may have begun the run.
        before = int(summary.get(_X) or 0) if run.resumed and not last else 0
        made = self._runs[step] = _WandbRun(run, state, last, before)
        return made


def wandb_id(step: TrackedStep) -> str:
    """The id of a step's run in W&B."""
    return hashlib.sha256(f"{step.recipe}/{step.key}/{step.fingerprint}".encode()).hexdigest()[:16]


def check_wandb(config: WandbTracking) -> None:
    """Raises InputError if the package is not installed, or there is no key for a run that is online."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError("tracking.wandb: the package wandb is not installed", "pip install 'moray[wandb]'")
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    if config.mode == "online" and not (config.api_key or os.environ.get("WANDB_API_KEY") or _is_logged_in(host)):
        raise InputError(
            f"tracking.wandb: there is no key for {host}",
            "set WANDB_API_KEY, run `wandb login`, or set tracking.wandb.mode to offline",
        )


def _is_logged_in(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _log_row(found: _WandbRun) -> None:
    if found.row:
        found.run.log({**found.row, _X: found.at})
        found.row = {}
