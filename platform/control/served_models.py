"""Finds the models that deployments name, in the store of their cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moray.platform.control.managed_cluster import ManagedCluster
from moray.platform.core.errors import InputError, MorayError
from moray.platform.core.home import Home
from moray.platform.store.aliases import DEPLOYED, NEWEST
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.manifest import REFERENCE
from moray.platform.store.paths import any_path
from moray.platform.store.search import find_artifact

_FILES = ("config.json", "tokenizer.json")


@dataclass(frozen=True)
class FoundModel:
    """A model to serve.

    model: its name, with the alias' version if it is one. reference: step/fingerprint, or the path of a folder.
    folder: where replicas read it.
    """

    model: str
    reference: str
    folder: str


class ServedModels:
    """The models that one cluster can serve."""

    def __init__(self, home: Home, cluster: ManagedCluster) -> None:
        self._remote = bool(cluster.store)
        self.remote = self._remote or bool(home.shared)  # whether aliases are in a store
        self._store = ArtifactStore(Home(home.root, cluster.store) if self._remote else home)

    def find(self, model: str) -> FoundModel:
        """The model behind an alias (`NAME` stands for `NAME@newest`), an artifact or an absolute path of a folder.
        Raises InputError."""
        folder = _readable_folder(model) if model.startswith("/") else None
        if folder is not None and not folder.is_relative_to(self._store.root):  # there it is an artifact
            return self._folder(folder)
        aliases = self._store.aliases.all()
        name = f"{model}@{NEWEST}" if f"{model}@{NEWEST}" in aliases else model
        artifact = find_artifact(self._store, name)
        if artifact.manifest.produces != "model":
            produced = artifact.manifest.produces
            raise InputError(f"{model!r} is an artifact of kind {produced!r}, not a model", "name an `export` artifact")
        located = self._store.locate(artifact, everywhere=self._remote)
        return FoundModel(name if "@" in name else artifact.reference, artifact.reference, located.address)

    def target(self, alias: str) -> str:
        """The reference that an alias names; "" if it names none. Raises InputError if the store does not answer."""
        return self._store.aliases.all().get(alias, "")

    def gone(self, folder: str) -> str:
        """Why a model cannot be read; "" if it can."""
        try:
            missing = [name for name in _FILES if not (any_path(folder) / name).is_file()]
        except (MorayError, OSError) as error:
            return f"the model in {folder} cannot be read: {error}"
        return f"the model in {folder} is gone: it has no {missing[0]}" if missing else ""

    def mark(self, name: str, reference: str) -> None:
        """Sets the alias NAME@deployed, which also keeps the artifact from being removed."""
        if REFERENCE.fullmatch(reference) and self._store.aliases.all().get(f"{name}@{DEPLOYED}") != reference:
            self._store.aliases.set(name, DEPLOYED, reference)

    def unmark(self, name: str) -> None:
        """Removes the alias NAME@deployed."""
        if f"{name}@{DEPLOYED}" in self._store.aliases.all():
            self._store.aliases.drop(f"{name}@{DEPLOYED}")

    def _folder(self, path: Path) -> FoundModel:
        if self._remote:
            raise InputError(
                f"{path} is a folder of this machine, which the cluster's hosts do not see",
                f"import it first: moray models import {path}",
            )
        if missing := [name for name in _FILES if not (path / name).is_file()]:
            raise InputError(f"{path} contains no {missing[0]}", "give a folder in the Hugging Face layout")
        return FoundModel(str(path), str(path), str(path))


def _readable_folder(path: str) -> Path | None:
    """The folder at a path, if there is one. Raises InputError for a path that cannot be read."""
    try:
        return Path(path) if Path(path).is_dir() else None
    except OSError as error:
        raise InputError(
            f"{path:.100} cannot be read: {error.strerror}", "give a folder in the Hugging Face layout"
        ) from error
