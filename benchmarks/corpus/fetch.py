"""Fetches packages into a cache and records the version, file, size and SHA-256 of each.

`apt-get download` fetches Debian packages and checks them against the signed lists of their archive. `pip download`
fetches Python packages and checks them against the hashes in requirements.txt. A file that is already in the cache with
the right hash is not fetched again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moray.platform.core.errors import InputError

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_PIN = re.compile(r"^([\w-]+)==(\S+) --hash=sha256:(\w+)$", re.M)
_RECORD = "packages.json"


@dataclass(frozen=True)
class Package:
    """A file in the cache."""

    name: str
    origin: str
    version: str
    file: str
    size: int
    sha256: str


def fetch_debian(names: Sequence[str], cache: Path) -> dict[str, Package]:
    """The .deb of each package, in the version that apt would install. Raises InputError."""
    known = _recorded(cache)
    if missing := [name for name in names if name not in known]:
        for tool in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise InputError(f"no {tool}: this corpus is built of Debian packages", "build it on Debian 12")
        stanzas = _candidates(missing)
        cache.mkdir(parents=True, exist_ok=True)
        print(f"fetching {', '.join(missing)}", file=sys.stderr)
        _run(["apt-get", "download", "-qq", *missing], cache, "is the archive reachable? `apt-get update` may help")
        known |= {name: _checked(name, stanzas[name], cache) for name in missing}
        _record(cache, known)
    return {name: known[name] for name in names}


def fetch_python(names: Sequence[str], cache: Path) -> dict[str, Package]:
    """The wheel or source archive of each package, as pinned. Raises InputError."""
    pins = {name: (version, sha) for name, version, sha in _PIN.findall(REQUIREMENTS.read_text())}
    known = _recorded(cache)
    missing = [name for name in names if name not in known or known[name].sha256 != pins[name][1]]
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        print(f"fetching {', '.join(missing)}", file=sys.stderr)
        wanted = cache / "wanted.txt"
        wanted.write_text("".join(f"{name}=={pins[name][0]} --hash=sha256:{pins[name][1]}\n" for name in missing))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-build-isolation", "--require-hashes", "-r", str(wanted), "-d", "."]
        _run(command, cache, "is the package index reachable?")
        wanted.unlink()
        found = {_sha256(path): path for path in cache.iterdir() if path.suffix in (".whl", ".gz")}
        for name in missing:
            version, sha = pins[name]
            known[name] = Package(name, "python", version, found[sha].name, found[sha].stat().st_size, sha)
        _record(cache, known)
    return {name: known[name] for name in names}


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(path, contents) of the regular files of a .deb, a wheel or a source archive, in the archive's order."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            yield from ((name, archive.read(name)) for name in archive.namelist() if not name.endswith("/"))
    elif path.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(path)]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            yield from _files(archive)
        if process.returncode:
            raise InputError(f"{path}: dpkg-deb cannot unpack it", "remove the file and build again")
    else:
        with tarfile.open(path) as archive:
            yield from _files(archive)


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        file = archive.extractfile(member) if member.isreg() else None
        if file is not None:
            yield member.name.removeprefix("."), file.read()


def _candidates(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Fields of the version that apt would install, by package. As root, updates apt's lists if one is missing."""
    found = _shown(names)
    if len(found) < len(names) and os.geteuid() == 0:
        _run(["apt-get", "update", "-qq"], Path("/"), "is the archive reachable?")
        found = _shown(names)
    if unknown := [name for name in names if name not in found]:
        hint = "`sudo apt-get update` on Debian 12; or leave sources out: --skip SOURCE"
        raise InputError(f"apt knows no package {', '.join(unknown)}", hint)
    return found


def _shown(names: Sequence[str]) -> dict[str, dict[str, str]]:
    done = subprocess.run(
        ["apt-cache", "show", "--no-all-versions", *names], capture_output=True, text=True, check=False
    )
    stanzas = [dict(re.findall(r"^(\w+): (.*)$", text, flags=re.M)) for text in done.stdout.split("\n\n")]
    return {fields["Package"]: fields for fields in stanzas if "Package" in fields and "SHA256" in fields}


def _checked(name: str, fields: dict[str, str], cache: Path) -> Package:
    """The .deb that apt has just fetched, checked against the hash in apt's lists. Raises InputError."""
    version = fields["Version"].replace(":", "%3a")
    path = cache / f"{name}_{version}_{fields['Architecture']}.deb"
    if not path.is_file() or _sha256(path) != fields["SHA256"]:
        raise InputError(f"{path}: not what apt's lists promise", "`apt-get update`, and build again")
    return Package(name, "debian", fields["Version"], path.name, path.stat().st_size, fields["SHA256"])


def _recorded(cache: Path) -> dict[str, Package]:
    """The packages recorded in the cache whose files exist with the recorded hashes."""
    record = cache / _RECORD
    if not record.exists():
        return {}
    listed = [Package(**fields) for fields in json.loads(record.read_text())]
    return {
        package.name: package
        for package in listed
        if (cache / package.file).is_file() and _sha256(cache / package.file) == package.sha256
    }


def _record(cache: Path, packages: dict[str, Package]) -> None:
    rows = [asdict(packages[name]) for name in sorted(packages)]
    temporary = cache / f"{_RECORD}.new"
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    temporary.replace(cache / _RECORD)


def _run(command: Sequence[str], folder: Path, hint: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if not line.startswith("W")]
        raise InputError(f"{' '.join(command[:4])}: {words[-1] if words else f'exit {done.returncode}'}", hint)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
