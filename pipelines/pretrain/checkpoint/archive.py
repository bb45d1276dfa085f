"""Archive of checkpoints in an S3 bucket. Every complete checkpoint is copied, so that disks hold only the newest.

    <archive>/<run>/step-00000400/<digest>/<file>   as on disk; <digest> is a hash of checksums.json
    <archive>/<run>/step-00000400/checksums.json    written last: it marks the checkpoint as archived

Every rank copies its share of a checkpoint's files in a thread, while training continues. Ranks do not communicate: a
rank that finds all files in the bucket writes checksums.json. A failed copy is retried with the next checkpoint, and a
checkpoint that is not archived is not removed from the disk.
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
    """The result of copying a checkpoint. error: reason of a failure, "" if it is archived."""

    steps: int
    error: str = ""


def check_archive(url: str) -> None:
    """Raises InputError if the archive is not writable."""
    Bucket(url).put(_ROOT, b"{}\n")


class Archive:
    """The archive of one run's checkpoints, for rank `share[0]` of `share[1]`."""

    def __init__(self, url: str, run: str, folder: Path, share: tuple[int, int]) -> None:
        """folder: the checkpoints on disk. Raises InputError if `url` is not an s3:// address."""
        self.url = f"{url.rstrip('/')}/{run}"
        self._bucket = Bucket(self.url)
        self._folder = folder
        self._share = share
        self._thread = ThreadPoolExecutor(1, "archive")
        self._running: Future[None] | None = None
        self._known: set[int] = set()  # checkpoints that this rank knows to be archived
        self._copied: set[str] = set()  # prefixes that have this rank's share
        self._ended: list[Archived] = []
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts to copy all complete checkpoints that are not archived, unless a copy is running."""
        if self._running is None or self._running.done():
            self._running = self._thread.submit(self._copy_all)

    def wait(self) -> None:
        """Waits until this rank's share of all checkpoints on disk is archived, or has failed once more."""
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
        """Whether a checkpoint is archived. Raises InputError if the bucket is unavailable."""
        if steps not in self._known and self._bucket.get(f"{_prefix(steps)}/{CHECKSUMS}") is not None:
            self._known.add(steps)
        return steps in self._known

    def newest(self, excluded: Set[int] = frozenset()) -> int | None:
        """The newest archived checkpoint that is not in `excluded`. Raises InputError if the bucket is unavailable."""
        return next((steps for steps in sorted(self._steps() - excluded, reverse=True) if self.has(steps)), None)

    def discard_after(self, steps: int) -> None:
        """Removes checkpoints of more than `steps` steps from the archive, by removing their checksums.json."""
        discarded = [at for at in self._steps() if at > steps]
        self._bucket.delete([f"{_prefix(at)}/{CHECKSUMS}" for at in discarded])
        self._known -= set(discarded)

    def fetch(self, steps: int) -> None:
        """Downloads this rank's share of an archived checkpoint to the folder of an unfinished checkpoint."""
        unfinished = checkpoint_files.unfinished_path(self._folder, steps)
        listing = self._bucket.get(f"{_prefix(steps)}/{CHECKSUMS}")
        if listing is None:
            raise InputError(f"{self.url}/{_prefix(steps)}/{CHECKSUMS} is missing")
        self._bucket.download(_prefix(steps, listing), self._mine(listing), unfinished, _no_progress)
        if self._share[0] == 0:
            (unfinished / CHECKSUMS).write_bytes(listing)

    def _steps(self) -> set[int]:
        return {int(name.removeprefix("step-")) for name in self._bucket.folders() if name.startswith("step-")}

    def _mine(self, listing: bytes) -> list[FileEntry]:
        return _files(listing)[self._share[0] :: self._share[1]]

    def _copy_all(self) -> None:
        for steps in checkpoint_files.complete_steps(self._folder):
            try:
                if not self.has(steps):
                    self._copy(steps)
                    self._end(Archived(steps))
            except FileNotFoundError:
                continue  # removed by retention, because another rank found it archived
            except Exception as error:  # training continues after any error, and reports it
                self._end(Archived(steps, str(error) or type(error).__name__))
                return

    def _copy(self, steps: int) -> None:
        """Uploads this rank's share, and checksums.json if all files are then in the bucket."""
        folder = checkpoint_files.path_of(self._folder, steps)
        listing = (folder / CHECKSUMS).read_bytes()
        prefix = _prefix(steps, listing)
        if prefix not in self._copied:
            self._bucket.upload(folder, self._mine(listing), prefix, _no_progress)
            self._copied.add(prefix)
        sizes = {item.key.rpartition("/")[2]: item.size for item in self._bucket.objects(f"{prefix}/")}
        if all(sizes.get(entry.path) == entry.size for entry in _files(listing)):
            self._bucket.put(f"{_prefix(steps)}/{CHECKSUMS}", listing)

    def _end(self, one: Archived) -> None:
        with self._lock:
            self._ended.append(one)


def _prefix(steps: int, listing: bytes | None = None) -> str:
    """Prefix of a checkpoint. With `listing`, its checksums.json: prefix of its files, which includes a digest because
    a checkpoint of another layout has files of the same names."""
    prefix = checkpoint_files.path_of(Path(), steps).name
    return prefix if listing is None else f"{prefix}/{hashlib.sha256(listing).hexdigest()[:16]}"


def _files(listing: bytes) -> list[FileEntry]:
    return Checksums.model_validate_json(listing).files


def _no_progress(done: float, total: float) -> None:
    """Ignores progress, because the copy runs beside training."""
