"""The context passed to a running step: config, inputs, output folder, and methods to report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic

from moray.platform.core.atomic import is_full, write_text
from moray.platform.core.cluster import Cluster
from moray.platform.core.errors import Cancelled
from moray.platform.core.events import Event, EventLog, MetricEvent, NoteEvent, ProgressEvent, ScoreEvent, read_events
from moray.platform.core.home import Home
from moray.platform.plan.config import ConfigT
from moray.platform.store.artifacts import Artifact, ArtifactStore
from moray.platform.store.paths import AnyPath, StorePath
from moray.platform.store.search import find_artifact
from moray.platform.store.segments import SegmentReader


@dataclass
class StepContext(Generic[ConfigT]):
    """The context of a running step. `counts` and `outcome` are written to the manifest and the closing table.

    folder: a folder of this process's host. Its files become part of the artifact. stored: if tasks run on hosts that
    do not see that folder, the artifact's folder in the store.
    """

    step: str
    config: ConfigT
    inputs: Mapping[str, Artifact]
    folder: Path
    home: Home
    run: Path
    events: EventLog
    cluster: Cluster
    fingerprint: str
    name: str = ""
    counts: dict[str, float] = field(default_factory=dict)
    outcome: str = ""
    cancel: Callable[[], bool] = lambda: False
    stored: StorePath | None = None
    _last: dict[str, float] = field(default_factory=dict)

    @property
    def output(self) -> AnyPath:
        """The artifact's folder, for tasks on any host. On one machine it is `folder`."""
        return self.stored or self.folder

    @property
    def events_folder(self) -> AnyPath:
        """The folder for the events of this run's processes on any host."""
        return StorePath(self.stored.root, f"runs/{self.run.name}/events") if self.stored else self.run / "events"

    def events_of(self, run: str) -> list[Event]:
        """The events of a run, ordered by time: this one's so far, or those of an earlier one."""
        folder = self.home.runs / run
        if self.stored:
            SegmentReader(StorePath(self.stored.root, f"runs/{run}"), folder).poll()
        return read_events(folder)

    def artifact(self, reference: str) -> Artifact:
        """Another artifact, whose `location` tasks on any host can read. Raises InputError if it does not exist."""
        store = ArtifactStore(self.home)
        found = find_artifact(store, reference)
        return store.locate(found, everywhere=True) if self.stored else store.fetch(found)

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def progress(self, phase: str, done: float, total: float, unit: str, detail: str = "") -> None:
        """Reports `done` of `total`. Emits at most ten events a second per phase, and always the last one."""
        self.check_cancelled()
        now = time.monotonic()
        if done < total and now - self._last.get(phase, 0.0) < 0.1:
            return
        self._last[phase] = now
        self.emit(ProgressEvent(step=self.step, phase=phase, done=done, total=total, unit=unit, detail=detail))

    def metric(self, name: str, value: float, at: int = 0, **labels: str) -> None:
        self.emit(MetricEvent(step=self.step, name=name, value=value, at=at, labels=labels))

    def score(self, task: str, metric: str, value: float, n: int, interval: tuple[float, float] | None) -> None:
        """Reports the result of an evaluation with its 95 % interval."""
        self.emit(ScoreEvent(step=self.step, task=task, metric=metric, value=value, n=n, interval=interval))

    def note(self, text: str, level: str = "info") -> None:
        self.emit(NoteEvent(step=self.step, level="warning" if level == "warning" else "info", text=text))

    def log_path(self, name: str) -> Path:
        """Path of this step's log called `name`, in the run's folder, so that it survives removal of the artifact."""
        return self.run / "logs" / f"{self.step}.{name}.txt"

    def write_log(self, name: str, text: str) -> None:
        """Writes a log to the run's folder. On a full disk it is dropped; the original error matters more."""
        try:
            write_text(self.log_path(name), self.events.redact(text))
        except OSError as error:
            if not is_full(error):
                raise

    def check_cancelled(self) -> None:
        """Raises Cancelled if the run is being stopped. Call it in long loops."""
        if self.cancel():
            raise Cancelled
