"""The manifest of an artifact: its files, origin and cost. An artifact without a manifest does not exist."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moray.platform.core.errors import InputError

MANIFEST = "manifest.json"
REFERENCE = re.compile(r"[a-z0-9][\w.-]*/\w[\w.-]*")  # step/fingerprint
_TEMPORARY = re.compile(r"^\..*\.[^.]+$")  # temporary files of platform/core/atomic.py
_RECORDED = ("ray", "torch", "pyarrow", "tokenizers", "numba", "numpy", "mlflow", "deepspeed")


class DamagedError(InputError):
    """An artifact whose manifest exists but cannot be read. Other artifacts are not affected."""

    def __init__(self, reference: str, where: str, problem: str, hint: str = "") -> None:
        default = f"remove it with `moray artifacts rm {reference}`; the next run makes it again"
        super().__init__(f"artifact {reference} is damaged: {where}: {problem}", hint or default)
        self.reference = reference

    def __reduce__(self) -> tuple[Any, ...]:
        return InputError, (self.message, self.hint)


class FileEntry(BaseModel):
    """One file of an artifact: path relative to its folder, size in bytes, SHA-256."""

    model_config = ConfigDict(frozen=True)

    path: str
    size: int
    sha256: str


class Manifest(BaseModel):
    """`manifest.json`. `config` is the full config, `address` the inputs of the fingerprint."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    step: str
    step_version: int
    fingerprint: str
    produces: str
    config: dict[str, Any]
    address: dict[str, Any]
    inputs: dict[str, str] = Field(default_factory=dict)  # input name -> "step/fingerprint"
    files: list[FileEntry]
    bytes: int
    counts: dict[str, float] = Field(default_factory=dict)
    outcome: str = ""
    run: str
    code: dict[str, str]
    environment: dict[str, str]
    started: float  # seconds since the epoch
    seconds: float  # wall time of the attempt that finished
    cpu_seconds: float  # cores held x wall time
    gpu_seconds: float = 0.0


ManifestT = TypeVar("ManifestT", bound=Manifest)


def read_manifest(
    kind: type[ManifestT], text: bytes, step: str, fingerprint: str, where: str, hint: str = ""
) -> ManifestT:
    """Parses the manifest of `step/fingerprint` from `text`. Raises DamagedError with the location `where`."""
    reference = f"{step}/{fingerprint}"
    if not text:
        raise DamagedError(reference, where, "the file is empty", hint)
    try:
        found = kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        problem = f"{field}: {first['msg']}" if field else first["msg"]
        raise DamagedError(reference, where, problem, hint) from error
    if (found.step, found.fingerprint) != (step, fingerprint):
        raise DamagedError(reference, where, f"it belongs to {found.step}/{found.fingerprint}", hint)
    return found


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path) -> list[FileEntry]:
    """Hashes every file under `folder` except the manifest and temporary files (`.name.xyz`), sorted by path."""
    paths = sorted(files_in(folder))
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(hash_file, paths))
    return [
        FileEntry(path=str(path.relative_to(folder)), size=path.stat().st_size, sha256=sha)
        for path, sha in zip(paths, hashes, strict=True)
    ]


def files_in(folder: Path) -> Iterator[Path]:
    """Yields the files of an artifact: all except the manifest and temporary files."""
    for path in folder.rglob("*"):
        if path.is_file() and path != folder / MANIFEST and not _TEMPORARY.match(path.name):
            yield path


@lru_cache(maxsize=1)
def code_revision() -> dict[str, str]:
    """Returns Moray's version and, in a checkout, the commit and whether there are uncommitted changes."""
    import moray

    revision = {"moray": moray.__version__}  # type: ignore[attr-defined]
    checkout = Path(moray.__file__).resolve().parent
    if not (checkout / ".git").exists():
        return revision
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True, timeout=10
        )
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=checkout, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return revision  # no git, or a checkout of another user: only the version is known
    return {**revision, "commit": commit.stdout.strip(), "modified": "yes" if status.stdout.strip() else "no"}


@lru_cache(maxsize=1)
def environment() -> dict[str, str]:
    """Returns the versions of Python, the platform and the packages that can affect a result."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for name in _RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
