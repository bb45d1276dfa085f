"""Source hash of a step: over its module and every Moray module that it imports, transitively.

The hash is not part of the fingerprint, so a harmless edit does not invalidate results. It is kept in the manifest, so
that a run can warn when it reuses an artifact made by older code. The platform's own modules are excluded: they run
steps but do not affect their results.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # benchmarks hash sources on machines without pydantic
    from moray.platform.plan.step import Step

_PACKAGES = ("moray.pipelines", "moray.actors", "moray.models", "moray.kernels")


def source_hash(step: Step[Any]) -> str:
    """Returns 16 hex characters; '' for a step whose source is unavailable (a zipped or compiled module)."""
    return hash_sources(with_imports([type(step).__module__]))


def hash_sources(files: Mapping[str, Path]) -> str:
    """Hashes names and contents to 16 hex characters; '' for no files."""
    if not files:
        return ""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name].read_bytes()).digest())
    return digest.hexdigest()[:16]


def with_imports(modules: Iterable[str]) -> dict[str, Path]:
    """Returns these modules and every Moray module that they import, transitively: name -> source file."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name in found or path is None:
            continue
        found[name] = path
        waiting += [other for other in imports_of(path) if other.startswith(_PACKAGES)]
    return found


@lru_cache(maxsize=1024)
def _file(module: str) -> Path | None:
    """The module's source file; None if the name is not a module (for example a function).

    Moray modules are located by path: Python's finders would import `a.b`, and with it torch, to locate `a.b.c`.
    """
    import moray

    if module.startswith("moray."):
        path = Path(moray.__path__[0], *module.split(".")[1:]).with_suffix(".py")
        return path if path.is_file() else None
    origin = getattr(sys.modules.get(module), "__file__", None)
    return Path(origin) if origin and origin.endswith(".py") else None


@lru_cache(maxsize=1024)
def imports_of(path: Path) -> tuple[str, ...]:
    """Returns every module named in an import statement of the file, at the top or inside a function."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)
