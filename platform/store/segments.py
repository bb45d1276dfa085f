"""Growing files of a run (events, logs) in the store, as segments that are never changed.

    <run>/events/runner-1-ab.jsonl.parts/000000000000    the first bytes of the file
    <run>/events/runner-1-ab.jsonl.parts/000000004711    the bytes from offset 4711 on

A writer uploads what its files have gained, every few seconds. A reader appends to its copy the segment that begins
where the copy ends, so a segment that is read again adds nothing, and none is skipped. If the writer's host is lost, so
are at most the bytes since its last upload; what is derived from them is done again by the next attempt.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from moray.platform.core.errors import InputError
from moray.platform.core.events import EventLog
from moray.platform.store.paths import AnyPath, StorePath, cache, in_threads

UPLOAD_SECONDS = 2.0
PARTS = ".parts"
_GROWING = ("events/*.jsonl", "logs/**/*")
_LARGEST = 16 << 20  # bytes of a segment
_DIGITS = 12
_brought: set[Path] = set()  # files that this process has brought from the store, which are not to be uploaded again


class SegmentWriter:
    """Uploads the events and logs below `folder` to the run `target`, from a thread, until `close`."""

    def __init__(self, folder: Path, target: StorePath) -> None:
        self._folder, self._target = folder, target
        self._uploaded: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="segments", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Uploads what the files have gained. Raises InputError."""
        with self._lock:
            paths = {path for pattern in _GROWING for path in self._folder.glob(pattern) if path.is_file()}
            in_threads(self._upload, sorted(paths - _brought))

    def close(self) -> None:
        """Uploads the rest and ends the thread. Raises InputError."""
        self._end.set()
        self._thread.join()
        self.flush()

    def _upload(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            name = f"{path.relative_to(self._folder).as_posix()}{PARTS}"
            if path not in self._uploaded:
                self._uploaded[path] = self._stored_size(name)
            while True:
                begin = file.seek(self._uploaded[path])
                data = file.read(_LARGEST)
                if path.suffix == ".jsonl":  # an event that is being written is not complete yet
                    data = data[: data.rfind(b"\n") + 1]
                if not data:
                    return
                (self._target / name / f"{begin:0{_DIGITS}d}").write_bytes(data)
                self._uploaded[path] = begin + len(data)

    def _stored_size(self, name: str) -> int:
        """The end of the last segment of a file, of which another process may have uploaded a part."""
        prefix = f"{(self._target / name).key}/"
        ends = (int(item.key.removeprefix(prefix)) + item.size for item in self._target.bucket.objects(prefix))
        return max(ends, default=0)

    def _repeat(self) -> None:
        while not self._end.wait(UPLOAD_SECONDS):
            with contextlib.suppress(InputError, OSError):  # the store is away: the next round uploads more
                self.flush()


class SegmentReader:
    """Brings the segments of the run `source` to files below `folder`, which may hold some of them already."""

    def __init__(self, source: StorePath, folder: Path) -> None:
        self._source, self._folder = source, folder
        self._last: dict[str, str] = {}  # the key of the last segment of each file, after which new ones come

    def poll(self) -> None:
        """Appends all new segments. Raises InputError."""
        for name in self._files("events/") + self._files("logs/") + self._files("logs/ray/"):
            self._append(name)

    def _files(self, prefix: str) -> list[str]:
        """Names of the growing files directly below a prefix."""
        names = self._source.bucket.folders(f"{self._source.key}/{prefix}")
        return [prefix + name.removesuffix(PARTS) for name in names if name.endswith(PARTS)]

    def _append(self, name: str) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _brought.add(path)
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another thread or process may bring the same run
            file.seek(0, os.SEEK_END)
            prefix = f"{self._source.key}/{name}{PARTS}/"
            # A segment that begins before the end of the copy may reach beyond it, if the reader was killed.
            early = prefix + f"{file.tell() - _LARGEST - 1:0{_DIGITS}d}" if file.tell() > _LARGEST else ""
            for item in self._source.bucket.objects(prefix, after=self._last.get(name, early)):
                begin = int(item.key.removeprefix(prefix))
                if begin <= file.tell() < begin + item.size:
                    file.write((self._source.bucket.get(item.key) or b"")[file.tell() - begin :])
                    file.flush()
                if begin + item.size <= file.tell():
                    self._last[name] = item.key


@contextlib.contextmanager
def event_log(folder: AnyPath, writer: str) -> Iterator[EventLog]:
    """An event log in the `events` folder of a run, which may be in the store, for a process on any host."""
    if isinstance(folder, Path):
        log = EventLog(folder, writer)
        try:
            yield log
        finally:
            log.close()
        return
    with cache().folder() as scratch:
        log = EventLog(scratch / folder.name, writer)
        segments = SegmentWriter(scratch, folder.parent)
        try:
            yield log
        finally:
            log.close()
            segments.close()
