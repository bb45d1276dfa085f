"""The files of a source in a recipe: on this machine, in a package, or in a bucket."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from moray.pipelines.corpus.globs import matches, pattern_error
from moray.pipelines.corpus.listing import EXCLUDED, NOT_INCLUDED, Listing, list_folder, printable_name
from moray.pipelines.corpus.source_file import File
from moray.platform.core.errors import InputError
from moray.platform.plan.config import ON_HOSTS, StepConfig, operational, user_path
from moray.platform.store.paths import StorePath, bucket_at
from moray.platform.store.submitted import SubmittedFile, read_tree


class FileSource(StepConfig):
    """Files in one place: a folder or file (`path`), an installed Python package (`package`), or `url: s3://...`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    path: Path | None = operational(None, description="a folder or file on this machine")
    package: str | None = operational(None, description="an installed Python package")
    url: str | None = operational(None, pattern=r"^s3://[^/?#]+(/[^?#]*)?$", description="s3://bucket/prefix")
    include: tuple[str, ...] = Field(("**/*",), description="patterns of paths below the location, as in pathlib")
    exclude: tuple[str, ...] = Field((), description="patterns of paths to skip")
    submitted: str = operational("", description="set by `moray submit`: the files of `path` or `package` in the store")
    made_by: str = operational("", description="the command that creates the files, shown if they are missing")

    @field_validator("include", "exclude")
    @classmethod
    def _can_match(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [reason for pattern in value if (reason := pattern_error(pattern))]:
            raise ValueError(wrong[0])
        return value

    @model_validator(mode="after")
    def _one_location(self) -> Self:
        if sum(location is not None for location in (self.path, self.package, self.url)) != 1:
            raise ValueError("give exactly one of `path`, `package` and `url`")
        return self

    @property
    def is_on_hosts(self) -> bool:
        """Whether the files are those of the cluster's hosts, which this machine may not have."""
        return self.path is not None and str(self.path).startswith(ON_HOSTS)

    def has_files(self) -> bool:
        """Whether the location exists on this machine."""
        return self.path is None or user_path(self.path).exists()

    def location(self) -> str:
        """The location of the files, for messages."""
        return self.url or str(self.root())

    def root(self) -> Path:
        """The folder or file on this machine. Raises InputError if it does not exist."""
        if self.path is not None:
            root = user_path(self.path)
            if not root.exists():
                hint = f"run `{self.made_by}` to create it" if self.made_by else "correct the path in the recipe"
                raise InputError(f"source {self.name!r}: {root.absolute()} does not exist", hint)
            return root.absolute()
        spec = importlib.util.find_spec(str(self.package))
        if spec is None or spec.origin is None:
            raise InputError(
                f"source {self.name!r}: package {self.package!r} is not installed", f"pip install {self.package}"
            )
        return Path(spec.origin).parent

    def files(self) -> list[tuple[str, File]]:
        """(key, file) of every file, sorted by key, the path relative to the root with slashes. Raises InputError."""
        return self.listing().files

    def listing(self) -> Listing:
        """The files, and the skipped ones. Raises InputError."""
        if self.submitted:  # the submitter has applied the rules below
            return Listing([(file.key, _submitted(file)) for file in read_tree(self.submitted)])
        found = self._objects() if self.url is not None else self._paths()
        files, found.files = found.files, []
        for key, file in files:
            if reason := self.skip_reason(key):
                found.skip(key, reason)
            else:
                found.files.append((key, file))
        return found

    def skip_reason(self, key: str) -> str:
        """The reason to skip a file that `include` and `exclude` admit; '' to read it."""
        return ""

    def patterns(self) -> tuple[Sequence[str], Sequence[str]]:
        """The patterns of files to read, and of files to skip."""
        return self.include, self.exclude

    def names_at(self, name: str) -> Sequence[str]:
        """The names of the files that a location without files below it stands for."""
        return (name,)

    def _paths(self) -> Listing:
        root = self.root()
        try:
            if root.is_file():
                return Listing([(printable_name(root.name), File(str(root), root.stat().st_size))])
            return list_folder(root, *self.patterns())
        except InputError as error:
            raise InputError(f"source {self.name!r}: {error.message}", error.hint) from error
        except OSError as error:
            raise InputError(f"source {self.name!r}: {root}: {error.strerror}", "grant read access") from error

    def _objects(self) -> Listing:
        """The objects below the URL or, if there are none, the objects with that URL."""
        include, exclude = self.patterns()
        url = str(self.url).rstrip("/")
        found = Listing()
        try:
            listed = list(_listed(url))
            if not listed and url.count("/") > 2:
                folder, _, name = url.rpartition("/")
                found.files = [(key, file) for key, file in _listed(folder, name) if key in self.names_at(name)]
        except InputError as error:
            raise InputError(f"source {self.name!r}: {error.message}", error.hint) from error
        for key, file in sorted(listed, key=lambda one: one[0]):
            if not any(matches(key, pattern) for pattern in include):
                found.skip(key, NOT_INCLUDED)
            elif any(matches(key, pattern) for pattern in exclude):
                found.skip(key, EXCLUDED)
            else:
                found.files.append((key, file))
        return found


def _submitted(file: SubmittedFile) -> File:
    if isinstance(file.place, StorePath):
        return File(str(file.place), file.size, root=file.place.root, sha256=file.sha256)
    return File(str(file.place), file.size, sha256=file.sha256)


def _listed(url: str, beginning: str = "") -> Iterator[tuple[str, File]]:
    for item in bucket_at(url).objects(beginning):
        if item.size or not item.key.endswith("/"):  # an empty object represents a folder
            yield item.key, File(f"{url}/{item.key}", item.size, item.etag, url)
