"""Moray's own code as a package that travels with a job to an existing cluster (Ray's `working_dir`).

It has the modules and their data files, without tests and benchmarks: about a megabyte, far below Ray's limit of
500 MB. Its name is a hash of its contents, so each version is uploaded once per cluster.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_FOLDERS = ("actors", "cluster", "kernels", "models", "pipelines", "platform", "recipes")
_SKIPPED = {"__pycache__", ".pytest_cache", "moray.egg-info"}
_DEFLATED = zipfile.ZIP_DEFLATED
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of all entries, so that equal contents make equal archives


@dataclass(frozen=True)
class CodePackage:
    """A zip archive and its name on the cluster."""

    name: str
    data: bytes

    @property
    def uri(self) -> str:
        return f"gcs://{self.name}"


@lru_cache(maxsize=1)  # the code of a running process does not change
def code_package() -> CodePackage:
    """Packs the code that this process runs."""
    import moray

    root = Path(moray.__path__[0])
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(zipfile.ZipInfo("moray.py", _EPOCH), Path(moray.__file__).read_bytes(), _DEFLATED)
        for path in _files(root):
            archive.writestr(zipfile.ZipInfo(path.relative_to(root).as_posix(), _EPOCH), path.read_bytes(), _DEFLATED)
    digest = hashlib.sha256(data.getvalue()).hexdigest()[:32]
    return CodePackage(f"_ray_pkg_{digest}.zip", data.getvalue())


def _files(root: Path) -> Iterator[Path]:
    for folder in _FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and not _SKIPPED & set(path.relative_to(root).parts):
                yield path
