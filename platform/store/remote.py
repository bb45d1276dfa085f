"""Artifacts in a shared root, `s3://bucket/prefix`: the source of truth for several machines.

    <step>/<fingerprint>/<writer>/<path>      the files, in a folder that is unique to one writer; `w-tasks` is that
                                              of tasks on several hosts, for the holder of the lease
    <step>/<fingerprint>/leases/              the lease, while the step runs on several hosts
    <step>/<fingerprint>/manifest.json        created last, and only if none exists
    aliases/NAME@VERSION                      one line, step/fingerprint
    runs/<run>/                               a run's recipe, events and logs, once it has ended

The manifest names its writer's folder, so files and manifest always match: another writer's files are in another
folder, and files that no manifest names are leftovers.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moray.platform.core.errors import InputError
from moray.platform.store.bucket import Bucket, Progress, Stored
from moray.platform.store.manifest import (
    MANIFEST,
    REFERENCE,
    DamagedError,
    FileEntry,
    Manifest,
    hash_folder,
    read_manifest,
)
from moray.platform.store.paths import StorePath, store_variables
from moray.platform.store.segments import PARTS, SegmentReader
from moray.platform.store.store_lease import StoreLease

_WRITER = "w-"
_SHARED_WRITER = f"{_WRITER}tasks"
_LEASES = "leases"
_ALIASES, _RUNS = "aliases", "runs"
# Hints for a manifest that cannot be read, or that is an HTML page.
_DELETE = "delete that object: a machine with a local copy uploads it again, or the next run makes it again"
_IS_PAGE = "check for a proxy or a login page in front of the server; if the object itself is wrong, delete it"


class SharedManifest(Manifest):
    """A manifest in a shared root. `objects`: the name of the writer's folder, next to the manifest."""

    objects: str

    def local(self) -> Manifest:
        """Converts it to the manifest of a local folder."""
        return Manifest.model_validate(self.model_dump(exclude={"objects"}))


class RemoteArtifacts:
    """The artifacts below one URL. Every error is an InputError that names the object or the root."""

    def __init__(self, url: str) -> None:
        self._bucket = Bucket(url, variables=store_variables(url.rstrip("/")))
        self.url = self._bucket.url
        self.damaged: dict[str, DamagedError] = {}  # damaged artifacts found by listings so far, by reference

    def check_writable(self) -> None:
        self._bucket.check_writable()

    def get(self, step: str, fingerprint: str) -> SharedManifest | None:
        """Returns the manifest, or None. Raises DamagedError if it exists but cannot be read."""
        key = f"{step}/{fingerprint}/{MANIFEST}"
        text = self._bucket.get(key)
        hint = _IS_PAGE if text and text.lstrip()[:1] == b"<" else _DELETE
        where = f"{self.url}/{key}"
        return None if text is None else read_manifest(SharedManifest, text, step, fingerprint, where, hint)

    def get_or_none(self, step: str, fingerprint: str) -> SharedManifest | None:
        """Like `get`, but returns None for a damaged artifact and records it in `damaged`."""
        try:
            return self.get(step, fingerprint)
        except DamagedError as error:
            self.damaged[error.reference] = error
            return None

    def output(self, step: str, fingerprint: str) -> StorePath:
        """The folder to which the tasks of a step write, for the holder of the lease. Reruns continue it."""
        return StorePath(self.url, f"{step}/{fingerprint}/{_SHARED_WRITER}")

    def lease(self, step: str, fingerprint: str, run: str) -> StoreLease:
        return StoreLease(StorePath(self.url, f"{step}/{fingerprint}/{_LEASES}"), run)

    def complete(
        self, folder: Path, local: Sequence[FileEntry], manifest: Manifest, progress: Progress
    ) -> SharedManifest:
        """Commits an artifact whose tasks wrote to `output`. Uploads the files `local` of this host's folder, and
        writes the manifest, which names all files. Returns the final manifest: this writer's or another's."""
        if found := self.get(manifest.step, manifest.fingerprint):
            return found
        mine = SharedManifest(**manifest.model_dump(), objects=_SHARED_WRITER)
        self._bucket.upload(folder, local, f"{manifest.step}/{manifest.fingerprint}/{mine.objects}", progress)
        return self._publish(mine)

    def push(self, folder: Path, manifest: Manifest, progress: Progress) -> SharedManifest:
        """Uploads an artifact unless it exists. Returns the final manifest: this writer's or another's."""
        place = f"{manifest.step}/{manifest.fingerprint}"
        if found := self.get(manifest.step, manifest.fingerprint):
            return found
        mine = SharedManifest(**manifest.model_dump(), objects=f"{_WRITER}{secrets.token_hex(8)}")
        self._bucket.upload(folder, mine.files, f"{place}/{mine.objects}", progress)
        return self._publish(mine)

    def _publish(self, mine: SharedManifest) -> SharedManifest:
        """Creates the manifest of uploaded files, unless another writer was first. Returns the final manifest."""
        place = f"{mine.step}/{mine.fingerprint}"
        self._check_sizes(mine)
        text = mine.model_dump_json(indent=2).encode() + b"\n"
        if self._bucket.create(f"{place}/{MANIFEST}", text):
            return mine
        winner = self.get(mine.step, mine.fingerprint)
        if winner is None:
            raise InputError(f"{self.url}/{place} was removed while it was being written", "run again")
        if winner.objects != mine.objects:  # if equal, the response to our own request was lost
            self._bucket.delete([item.key for item in self._bucket.objects(f"{place}/{mine.objects}/")])
        return winner

    def pull(self, manifest: SharedManifest, folder: Path, progress: Progress) -> None:
        """Downloads an artifact to the empty `folder`. Raises InputError for a missing, short or corrupt object."""
        place = f"{manifest.step}/{manifest.fingerprint}/{manifest.objects}"
        for entry in manifest.files:
            if not (folder / entry.path).resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{self.url}/{place}: the path {entry.path!r} is outside the artifact's folder")
        hint = f"remove it with `moray artifacts rm {manifest.step}/{manifest.fingerprint}`, then run again"
        try:
            self._bucket.download(place, manifest.files, folder, progress)
        except InputError as error:
            raise InputError(error.message, error.hint or hint) from error
        arrived = {entry.path: entry for entry in hash_folder(folder)}
        for entry in manifest.files:
            found = arrived.get(entry.path)
            if found != entry:
                problem = "corrupt" if found and found.size == entry.size else "short or missing"
                raise InputError(f"{self.url}/{place}/{entry.path} is {problem}", hint)

    def address(self, manifest: SharedManifest) -> str:
        """The URL of an artifact's files."""
        return f"{self.url}/{manifest.step}/{manifest.fingerprint}/{manifest.objects}"

    def steps(self) -> list[str]:
        """The steps that have artifacts. Other folders have fixed names or begin with a dot."""
        return [name for name in self._bucket.folders() if name not in (_ALIASES, _RUNS) and name[0] != "."]

    def of_step(self, step: str, prefix: str = "") -> list[SharedManifest]:
        """Returns the artifacts of a step whose fingerprints start with `prefix`, without damaged ones."""
        names = self._bucket.folders(f"{step}/{prefix}")
        with ThreadPoolExecutor(8) as pool:
            return [found for found in pool.map(lambda name: self.get_or_none(step, name), names) if found]

    def remove(self, step: str, fingerprint: str) -> None:
        """Deletes an artifact, its manifest first, so that it stops existing at once."""
        self._bucket.delete([f"{step}/{fingerprint}/{MANIFEST}"])
        self._bucket.delete([item.key for item in self._bucket.objects(f"{step}/{fingerprint}/")])

    def leftovers(self, before: float) -> dict[str, list[Stored]]:
        """Returns writers' folders that no manifest names and that are older than a time -> their objects."""
        found: dict[str, list[Stored]] = {}
        for step in self.steps():
            for item in self._bucket.objects(f"{step}/"):
                parts = item.key.split("/")
                if len(parts) > 3 and parts[2].startswith(_WRITER):
                    found.setdefault("/".join(parts[:3]), []).append(item)
        old = {place: items for place, items in found.items() if max(item.modified for item in items) < before}
        return {place: items for place, items in old.items() if not self._is_named(place)}

    def sweep(self, before: float) -> list[str]:
        """Deletes leftovers; returns their folders."""
        found = self.leftovers(before)
        self._bucket.delete([item.key for items in found.values() for item in items])
        self._bucket.abort_uploads(before)
        return sorted(found)

    def alias(self, name: str) -> str:
        """Returns an alias's target; "" if the alias is damaged or missing."""
        text = self._bucket.get(f"{_ALIASES}/{name}")
        target = (text or b"").decode(errors="replace").strip()
        return target if REFERENCE.fullmatch(target) else ""

    def aliases(self) -> dict[str, str]:
        """Returns all aliases; damaged ones have an empty target."""
        names = [item.key.partition("/")[2] for item in self._bucket.objects(f"{_ALIASES}/")]
        return {name: self.alias(name) for name in names}

    def set_alias(self, name: str, reference: str) -> None:
        self._bucket.put(f"{_ALIASES}/{name}", f"{reference}\n".encode())

    def drop_alias(self, name: str) -> None:
        self._bucket.delete([f"{_ALIASES}/{name}"])

    def run(self, name: str) -> StorePath:
        """The folder of a run whose files are in the store from its start."""
        return StorePath(self.url, f"{_RUNS}/{name}")

    def push_run(self, folder: Path) -> str:
        """Uploads a run's folder; returns its URL."""
        self._bucket.upload(folder, hash_folder(folder), f"{_RUNS}/{folder.name}", lambda done, total: None)
        return f"{self.url}/{_RUNS}/{folder.name}"

    def runs(self) -> list[str]:
        return self._bucket.folders(f"{_RUNS}/")

    def pull_run(self, run: str, folder: Path) -> None:
        """Downloads a run's objects to `folder`."""
        place = f"{_RUNS}/{run}/"
        files = [FileEntry(path=i.key.removeprefix(place), size=i.size, sha256="") for i in self._bucket.objects(place)]
        whole = [entry for entry in files if f"{PARTS}/" not in entry.path]
        self._bucket.download(place.rstrip("/"), whole, folder, lambda done, total: None)
        SegmentReader(self.run(run), folder).poll()

    def _check_sizes(self, manifest: SharedManifest) -> None:
        """Checks, before the manifest is written, that all files are uploaded with their full size."""
        place = f"{manifest.step}/{manifest.fingerprint}/{manifest.objects}/"
        sizes = {item.key.removeprefix(place): item.size for item in self._bucket.objects(place)}
        for entry in manifest.files:
            if sizes.get(entry.path) != entry.size:
                raise InputError(
                    f"{self.url}/{place}{entry.path} was not uploaded completely", "run again to upload it again"
                )

    def _is_named(self, place: str) -> bool:
        step, fingerprint, writer = place.split("/")
        try:
            manifest = self.get(step, fingerprint)
        except DamagedError:
            return True  # it may name them: keep files that a repaired manifest could name
        return manifest is not None and manifest.objects == writer
