"""Curves as event files of TensorBoard, in PATH/RECIPE/STEP-FINGERPRINT.

The writer is tensorboardX's. Its classes with threads of their own would hide errors, so the synchronous one is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moray.platform.core.errors import InputError
from moray.platform.core.events import MetricEvent
from moray.platform.run.metric_sink import STEPPED, MetricSink, TrackedStep, curve_name

# Counts that are reported once, and not again after a rollback.
_COUNTS = ("train_rollbacks", "train_skipped_batches")


@dataclass
class _Folder:
    """The event file of one step. continues: an earlier run wrote to the folder. last: the last training step."""

    writer: Any
    continues: bool
    last: int | None = None
    counts: dict[str, float] = field(default_factory=dict)


class TensorBoardSink(MetricSink):
    title = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        """Raises InputError if the folder cannot be made."""
        self._root = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"tracking.tensorboard: {folder}: {error.strerror}", "set it to a folder that you can write"
            ) from error
        self._folders: dict[TrackedStep, _Folder] = {}

    def write(self, step: TrackedStep, event: MetricEvent) -> None:
        folder = self._folders.get(step) or self._open(step)
        self._restart(folder, event)
        name = curve_name(event)
        if event.name in _COUNTS:
            folder.counts[name] = event.value
        _write_value(folder.writer, name, event.value, event.at, event.time)

    def flush(self) -> None:
        for folder in self._folders.values():
            folder.writer.flush()

    def close(self) -> None:
        for folder in self._folders.values():
            folder.writer.close()

    def _open(self, step: TrackedStep) -> _Folder:
        from tensorboardX.event_file_writer import EventsWriter

        path = self._root / step.recipe / f"{step.key}-{step.fingerprint[:8]}"
        path.mkdir(parents=True, exist_ok=True)
        earlier = len(list(path.glob("events.out.tfevents.*")))
        # TensorBoard reads the files of a folder in the order of their names, which have only a second's resolution.
        made = self._folders[step] = _Folder(EventsWriter(str(path / "events"), f".{earlier:04d}"), earlier > 0)
        return made

    def _restart(self, folder: _Folder, event: MetricEvent) -> None:
        """Withdraws the values from this step on, if training has resumed from an earlier one. A step without training
        starts from its beginning."""
        if event.name == STEPPED:
            goes_back = folder.continues if folder.last is None else event.at <= folder.last
            folder.last, folder.continues = event.at, False
        else:
            goes_back = folder.continues and not event.name.startswith("train_")
            folder.continues = folder.continues and not goes_back
        if not goes_back:
            return
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        log = SessionLog(status=SessionLog.START)
        folder.writer.write_event(Event(wall_time=event.time, step=event.at, session_log=log))
        for name, value in folder.counts.items():
            _write_value(folder.writer, name, value, event.at, event.time)


def _write_value(writer: Any, name: str, value: float, at: int, time: float) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
    writer.write_event(Event(wall_time=time, step=at, summary=summary))
