"""Checkpoints in an S3 bucket: every whole one goes there, so that only the newest need disks beside the workers.

    <archive>/<run>/step-00000400/<digest>/<file>   as on disk; the digest is that of the list
    <archive>/<run>/step-00000400/checksums.json    last, once all its files are there: the checkpoint is archived

Every rank copies its share of a checkpoint's files, in a thread of its own, while training goes on; ranks need not talk
about it, because who finds all files there writes the list. A copy that fails is tried again with the next checkpoint,
and what is not archived is not removed from the disk.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moray.pipelines.pretrain.checkpoint import checkpoint_files
from moray.pipelines.pretrain.checkpoint.checkpoint_files import CHECKSUMS, Checksums
from moray.platform.core.errors import InputError
from moray.platform.store.bucket import Bucket
from moray.platform.store.manifest import FileEntry

_ROOT = "moray-archive.json"


@dataclass(frozen=True)
class Archived:
    """A checkpoint whose copy ended; `error` says why it did not get there, "" if it did."""

    steps: int
    error: str = ""


def check_archive(url: str) -> None:
    """Raises InputError if nothing can be written there."""
    Bucket(url).put(_ROOT, b"{}\n")


class Archive:
    """The archive of one run's checkpoints, as rank `share[0]` of `share[1]` sees it."""

    def __init__(self, url: str, run: str, folder: Path, share: tuple[int, int]) -> None:
        """`folder` holds the checkpoints on disk. Raises InputError for what is not an s3:// address."""
        self.url = f"{url.rstrip('/')}/{run}"
        self._bucket = Bucket(self.url)
        self._folder = folder
        self._share = share
        self._thread = ThreadPoolExecutor(1, "archive")
        self._running: Future[None] | None = None
        self._known: set[int] = set()  # archived, as far as this rank has seen
        self._copied: set[str] = set()  # where this rank's share is there
        self._ended: list[Archived] = []
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begins to copy what is whole on disk and not in the archive; what is under way, goes on."""
        if self._running is None or self._running.done():
            self._running = self._thread.submit(self._copy_all)

    def wait(self) -> None:
        """Until this rank's share of everything on disk is there, or has failed once more."""
        if self._running:
            self._running.result()
        self.start()
        assert self._running is not None
        self._running.result()

    def ended(self) -> list[Archived]:
        """The copies that ended since the last call."""
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def has(self, steps: int) -> bool:
        """Whether a checkpoint is archived. Raises InputError if the bucket cannot be asked."""
        if steps not in self._known and self._bucket.get(f"{_place(steps)}/{CHECKSUMS}") is not None:
            self._known.add(steps)
        return steps in self._known

    def newest(self, but: Set[int] = frozenset()) -> int | None:
        """The last archived checkpoint, of those that are not in `but`. Raises InputError if it cannot be asked."""
        return next((steps for steps in sorted(self._steps() - but, reverse=True) if self.has(steps)), None)

    def forget_after(self, steps: int) -> None:
        """Makes checkpoints of more than `steps` steps be no longer archived."""
        later = [at for at in self._steps() if at > steps]
        self._bucket.delete([f"{_place(at)}/{CHECKSUMS}" for at in later])
        self._known -= set(later)

    def fetch(self, steps: int) -> None:
        """Copies this rank's share of an archived checkpoint's files to where an unfinished one lies."""
        unfinished = checkpoint_files.unfinished_path(self._folder, steps)
        listing = self._bucket.get(f"{_place(steps)}/{CHECKSUMS}")
        if listing is None:
            raise InputError(f"{self.url}/{_place(steps)}/{CHECKSUMS} is missing")
        self._bucket.download(_place(steps, listing), self._mine(listing), unfinished, _silent)
        if self._share[0] == 0:
            (unfinished / CHECKSUMS).write_bytes(listing)

    def _steps(self) -> set[int]:
        return {int(name.removeprefix("step-")) for name in self._bucket.folders() if name.startswith("step-")}

    def _mine(self, listing: bytes) -> list[FileEntry]:
        return _files(listing)[self._share[0] :: self._share[1]]

    def _copy_all(self) -> None:
        for steps in checkpoint_files.whole(self._folder):
            try:
                if not self.has(steps):
                    self._copy(steps)
                    self._end(Archived(steps))
            except FileNotFoundError:
                continue  # retention was faster: another rank has seen the whole of it archived
            except Exception as error:  # whatever it is, training goes on and says it
                self._end(Archived(steps, str(error) or type(error).__name__))
                return

    def _copy(self, steps: int) -> None:
        """This rank's share, and the list of all files if it was the last that was missing."""
        folder = checkpoint_files.path_of(self._folder, steps)
        listing = (folder / CHECKSUMS).read_bytes()
        place = _place(steps, listing)
        if place not in self._copied:
            self._bucket.upload(folder, self._mine(listing), place, _silent)
            self._copied.add(place)
        there = {item.key.rpartition("/")[2]: item.size for item in self._bucket.objects(f"{place}/")}
        if all(there.get(entry.path) == entry.size for entry in _files(listing)):
            self._bucket.put(f"{_place(steps)}/{CHECKSUMS}", listing)

    def _end(self, one: Archived) -> None:
        with self._lock:
            self._ended.append(one)


def _place(steps: int, listing: bytes | None = None) -> str:
    """Of a checkpoint, or of the files that a list names: another layout's have the same names."""
    place = checkpoint_files.path_of(Path(), steps).name
    return place if listing is None else f"{place}/{hashlib.sha256(listing).hexdigest()[:16]}"


def _files(listing: bytes) -> list[FileEntry]:
    return Checksums.model_validate_json(listing).files


def _silent(done: float, total: float) -> None:
    """Progress that nobody watches: training goes on meanwhile."""
