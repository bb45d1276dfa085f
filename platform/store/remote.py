"""Artifacts in a shared root, `s3://bucket/prefix`: the truth that several machines have in common.

    <step>/<fingerprint>/<writer>/<path>      the files, below a folder that only one writer knows
    <step>/<fingerprint>/manifest.json        created last, and only if there is none
    aliases/NAME@VERSION                      one line, step/fingerprint
    runs/<run>/                               a run's recipe, events and logs, once it has ended

The manifest names its writer's folder, so files and manifest always belong together: a rival's files lie elsewhere, and
files without a manifest are nobody's.
"""

from __future__ import annotations

import secrets
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

_WRITER = "w-"
_ALIASES, _RUNS = "aliases", "runs"
# What to do about a manifest that cannot be read, or that is a page of HTML.
_ANEW = "delete that object: a machine that has the artifact copies it there again, or the next run makes it again"
_IS_PAGE = "does a proxy or a login page answer in the server's place? If the object itself is wrong, delete it"


class SharedManifest(Manifest):
    """A manifest in a shared root. `objects`: the writer's folder, beside it, that holds the files."""

    objects: str

    def local(self) -> Manifest:
        """The same for a local folder."""
        return Manifest.model_validate(self.model_dump(exclude={"objects"}))


class RemoteArtifacts:
    """What lies below one URL. Every error is an InputError that names the object or the root."""

    def __init__(self, url: str) -> None:
        self._bucket = Bucket(url)
        self.url = self._bucket.url
        self.damaged: dict[str, DamagedError] = {}  # met by listings so far, by reference

    def check_writable(self) -> None:
        self._bucket.check_writable()

    def get(self, step: str, fingerprint: str) -> SharedManifest | None:
        """Raises DamagedError if there is a manifest that cannot be read."""
        key = f"{step}/{fingerprint}/{MANIFEST}"
        text = self._bucket.get(key)
        hint = _IS_PAGE if text and text.lstrip()[:1] == b"<" else _ANEW
        where = f"{self.url}/{key}"
        return None if text is None else read_manifest(SharedManifest, text, step, fingerprint, where, hint)

    def whole(self, step: str, fingerprint: str) -> SharedManifest | None:
        """As `get`, but None for one that is damaged, which is kept in mind."""
        try:
            return self.get(step, fingerprint)
        except DamagedError as error:
            self.damaged[error.reference] = error
            return None

    def push(self, folder: Path, manifest: Manifest, progress: Progress) -> SharedManifest:
        """Uploads an artifact unless it is there. Returns the manifest that stands in the end: ours or a rival's."""
        place = f"{manifest.step}/{manifest.fingerprint}"
        if found := self.get(manifest.step, manifest.fingerprint):
            return found
        mine = SharedManifest(**manifest.model_dump(), objects=f"{_WRITER}{secrets.token_hex(8)}")
        self._bucket.upload(folder, mine.files, f"{place}/{mine.objects}", progress)
        self._check_sizes(mine)
        text = mine.model_dump_json(indent=2).encode() + b"\n"
        if self._bucket.create(f"{place}/{MANIFEST}", text):
            return mine
        winner = self.get(manifest.step, manifest.fingerprint)
        if winner is None:
            raise InputError(f"{self.url}/{place} was removed while it was written", "run again")
        if winner.objects != mine.objects:  # else the answer to our own request was lost, and it is ours
            self._bucket.delete([item.key for item in self._bucket.objects(f"{place}/{mine.objects}/")])
        return winner

    def pull(self, manifest: SharedManifest, folder: Path, progress: Progress) -> None:
        """Fills the empty `folder`. Raises InputError naming the object that is missing, short or corrupt."""
        place = f"{manifest.step}/{manifest.fingerprint}/{manifest.objects}"
        for entry in manifest.files:
            if not (folder / entry.path).resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{self.url}/{place}: a file called {entry.path!r} would leave its folder")
        remedy = f"`moray artifacts rm {manifest.step}/{manifest.fingerprint}` removes it; then run again"
        try:
            self._bucket.download(place, manifest.files, folder, progress)
        except InputError as error:
            raise InputError(error.message, error.hint or remedy) from error
        arrived = {entry.path: entry for entry in hash_folder(folder)}
        for entry in manifest.files:
            found = arrived.get(entry.path)
            if found != entry:
                what = "corrupt" if found and found.size == entry.size else "short or missing"
                raise InputError(f"{self.url}/{place}/{entry.path} is {what}", remedy)

    def address(self, manifest: SharedManifest) -> str:
        """Where an artifact's files lie."""
        return f"{self.url}/{manifest.step}/{manifest.fingerprint}/{manifest.objects}"

    def steps(self) -> list[str]:
        return [name for name in self._bucket.folders() if name not in (_ALIASES, _RUNS)]

    def of_step(self, step: str, beginning: str = "") -> list[SharedManifest]:
        """The artifacts of a step whose fingerprints begin so; without damaged ones."""
        names = self._bucket.folders(f"{step}/{beginning}")
        with ThreadPoolExecutor(8) as pool:
            return [found for found in pool.map(lambda name: self.whole(step, name), names) if found]

    def remove(self, step: str, fingerprint: str) -> None:
        """First the manifest: from then on there is no such artifact."""
        self._bucket.delete([f"{step}/{fingerprint}/{MANIFEST}"])
        self._bucket.delete([item.key for item in self._bucket.objects(f"{step}/{fingerprint}/")])

    def leftovers(self, before: float) -> dict[str, list[Stored]]:
        """Folders of writers that no manifest names, and whose newest object is older than a time -> their objects."""
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
        """What it names; nothing where it is damaged or gone."""
        text = self._bucket.get(f"{_ALIASES}/{name}")
        target = (text or b"").decode(errors="replace").strip()
        return target if REFERENCE.fullmatch(target) else ""

    def aliases(self) -> dict[str, str]:
        """Damaged ones with an empty target."""
        names = [item.key.partition("/")[2] for item in self._bucket.objects(f"{_ALIASES}/")]
        return {name: self.alias(name) for name in names}

    def set_alias(self, name: str, reference: str) -> None:
        self._bucket.put(f"{_ALIASES}/{name}", f"{reference}\n".encode())

    def drop_alias(self, name: str) -> None:
        self._bucket.delete([f"{_ALIASES}/{name}"])

    def push_run(self, folder: Path) -> str:
        """Copies a run's folder; returns where it lies."""
        self._bucket.upload(folder, hash_folder(folder), f"{_RUNS}/{folder.name}", lambda done, total: None)
        return f"{self.url}/{_RUNS}/{folder.name}"

    def runs(self) -> list[str]:
        return self._bucket.folders(f"{_RUNS}/")

    def pull_run(self, run: str, folder: Path) -> None:
        """Copies what is there of a run into `folder`."""
        place = f"{_RUNS}/{run}/"
        files = [FileEntry(path=i.key.removeprefix(place), size=i.size, sha256="") for i in self._bucket.objects(place)]
        self._bucket.download(place.rstrip("/"), files, folder, lambda done, total: None)

    def _check_sizes(self, manifest: SharedManifest) -> None:
        """Before a manifest vouches for them, the files must all be there, and whole."""
        place = f"{manifest.step}/{manifest.fingerprint}/{manifest.objects}/"
        there = {item.key.removeprefix(place): item.size for item in self._bucket.objects(place)}
        for entry in manifest.files:
            if there.get(entry.path) != entry.size:
                raise InputError(f"{self.url}/{place}{entry.path} did not arrive whole", "run again to upload it anew")

    def _is_named(self, place: str) -> bool:
        step, fingerprint, writer = place.split("/")
        try:
            manifest = self.get(step, fingerprint)
        except DamagedError:
            return True  # it may name them: nothing is swept that somebody could mend
        return manifest is not None and manifest.objects == writer
