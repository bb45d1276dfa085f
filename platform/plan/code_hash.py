"""Which code makes a step's result: a hash over its module and every module of ours that it imports, in turn.

Fingerprints do not hold it: a harmless edit must not throw results away. It is kept in the manifest, so that reusing
an artifact which older code made can be said aloud. The platform's own modules are left out: they run steps, they do
not decide what steps make.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from moray.platform.plan.step import Step

_ROOMS = ("moray.pipelines", "moray.actors", "moray.models", "moray.kernels")


def source_hash(step: Step[Any]) -> str:
    """16 hex characters; '' for a step whose source is not to be had (a zipped or compiled module)."""
    return hash_sources(with_imports([type(step).__module__]))


def hash_sources(files: Mapping[str, Path]) -> str:
    """16 hex characters over names and contents; '' for no files."""
    if not files:
        return ""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name].read_bytes()).digest())
    return digest.hexdigest()[:16]


def with_imports(modules: Iterable[str]) -> dict[str, Path]:
    """These modules and every module of ours that they import, in turn: name -> source file."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name in found or path is None:
            continue
        found[name] = path
        waiting += [other for other in imports_of(path) if other.startswith(_ROOMS)]
    return found


@lru_cache(maxsize=1024)
def _file(module: str) -> Path | None:
    """The module's source file; None for a name that is no module (a function, say).

    Ours are found by path: asking Python's finders about `a.b.c` would import `a.b`, and torch with it.
    """
    import moray

    if module.startswith("moray."):
        path = Path(moray.__path__[0], *module.split(".")[1:]).with_suffix(".py")
        return path if path.is_file() else None
    origin = getattr(sys.modules.get(module), "__file__", None)
    return Path(origin) if origin and origin.endswith(".py") else None


@lru_cache(maxsize=1024)
def imports_of(path: Path) -> tuple[str, ...]:
    """Every module that the file names in an import statement, at the top or inside a function."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)
