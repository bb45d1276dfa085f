"""Records some steps of some ranks: a trace by torch's profiler and, on a GPU, the history of its memory.

<step's folder>/profile/rank-00000-steps-20-25.json.gz     for chrome://tracing or https://ui.perfetto.dev
<step's folder>/profile/rank-00000-steps-20-25.pickle      for https://pytorch.org/memory_viz
<step's folder>/profile/rank-00000-out-of-memory.pickle    if the GPU's memory does not suffice
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from moray.pipelines.pretrain.config import ProfiledSteps
from moray.platform.store.paths import AnyPath, write_file

_HISTORY = 200_000  # allocations and releases that are kept


class StepProfiler:
    """The profiler of one rank, for `settings`, or None to do nothing."""

    def __init__(self, settings: ProfiledSteps | None, rank: int, device: torch.device, folder: AnyPath) -> None:
        self._settings = settings if settings and rank in settings.ranks else None
        self._folder, self._name = folder / "profile", f"rank-{rank:05d}"
        self._cuda = device.type == "cuda"
        self._running: profile | None = None
        self._first = 0  # recorded step
        if self._settings and self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY)

    def before(self, step: int) -> None:
        """Must be called before step `step`, counted from 1."""
        if self._settings is None or self._running or not self._settings.steps[0] <= step <= self._settings.steps[1]:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._running = profile(activities=activities, record_shapes=True)
        self._running.start()
        self._first = step

    def after(self, step: int) -> AnyPath | None:
        """Must be called after step `step`. The trace, once it is written."""
        if self._settings is None or self._running is None or step < self._settings.steps[1]:
            return None
        running, self._running = self._running, None
        running.stop()
        name = f"{self._name}-steps-{self._first}-{step}"
        trace = self._write(f"{name}.json.gz", running.export_chrome_trace)
        if self._cuda:
            self._write(f"{name}.pickle", torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
        return trace

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block, an out-of-memory error leaves the memory's history, if this rank records it."""
        try:
            yield
        except torch.OutOfMemoryError:
            if self._settings and self._cuda:
                self._write(f"{self._name}-out-of-memory.pickle", torch.cuda.memory._dump_snapshot)
            raise

    def _write(self, name: str, export: Callable[[str], object]) -> AnyPath:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / name
            export(str(local))
            write_file(self._folder / name, local.read_bytes())
        return self._folder / name
