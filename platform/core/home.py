"""Paths under `MORAY_HOME` (default `~/.moray`), and the shared artifact root `MORAY_ARTIFACTS`."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from moray.platform.core.errors import InputError
from moray.platform.core.units import parse_size

_CACHE_BYTES = 100 * 10**9


@dataclass(frozen=True)
class Home:
    """The paths under one MORAY_HOME. Folders are created when something is written to them."""

    root: Path
    shared: str = ""  # what several machines share: s3://bucket/prefix, or a folder; "" for nothing

    @classmethod
    def from_environment(cls) -> Home:
        """Reads `$MORAY_HOME` (default `~/.moray`) and `$MORAY_ARTIFACTS`. Raises InputError if it is not writable."""
        root = Path(os.environ.get("MORAY_HOME") or Path.home() / ".moray").expanduser().absolute()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"MORAY_HOME {root}: {error.strerror}", "set MORAY_HOME to a writable folder") from error
        if not os.access(root, os.W_OK):
            raise InputError(f"MORAY_HOME {root} is not writable", "set MORAY_HOME to a writable folder")
        return cls(root, os.environ.get("MORAY_ARTIFACTS", ""))

    @property
    def shared_folder(self) -> Path | None:
        """The folder that several machines share, if `shared` is one. Artifacts, aliases and runs are in it."""
        return Path(self.shared) if self.shared.startswith("/") else None

    @property
    def artifacts(self) -> Path:
        return (self.shared_folder or self.root) / "artifacts"

    @property
    def aliases(self) -> Path:
        return (self.shared_folder or self.root) / "aliases"

    @property
    def pins(self) -> Path:
        """`<step>/<fingerprint>`: an empty file for every pinned artifact."""
        return self.root / "pins"

    @property
    def runs(self) -> Path:
        return (self.shared_folder or self.root) / "runs"

    @property
    def logs(self) -> Path:
        """Ray's logs, one folder per start."""
        return self.root / "logs"

    @property
    def cache(self) -> Path:
        """Compiled kernels and other caches; safe to delete at any time."""
        return self.root / "cache"

    @property
    def cache_bytes(self) -> int:
        """Limit of the cache of objects from the store, in bytes: `$MORAY_CACHE_BYTES`, by default 100 GB or half of
        the disk. Raises InputError if it is not a size."""
        if text := os.environ.get("MORAY_CACHE_BYTES"):
            try:
                return parse_size(text)
            except InputError as error:
                raise InputError(f"MORAY_CACHE_BYTES: {error.message}", error.hint) from error
        return min(_CACHE_BYTES, shutil.disk_usage(self.root).total // 2)

    @property
    def mlflow_db(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.root / "mlflow"

    @property
    def database(self) -> Path:
        """The control plane's SQLite database."""
        return self.root / "moray.db"

    @property
    def token(self) -> Path:
        """The token (mode 0600) that the control plane's API requires."""
        return self.root / "token"

    @property
    def keys(self) -> Path:
        """The keys of served models (mode 0600), as hashes."""
        return self.root / "keys.json"

    @property
    def up(self) -> Path:
        """State of `moray up`: its services' pids, ports, logs, sockets."""
        return self.root / "up"
