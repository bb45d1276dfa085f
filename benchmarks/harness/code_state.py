"""The code that a benchmark measured, as a hash that ignores comments, docstrings and layout.

A result stores the list of files and their hash. The documentation's tables compute the hash again and mark a result
whose code has changed since.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moray.platform.plan.code_hash import with_imports

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "models", "actors", "pipelines")


def measured_code(modules: Iterable[str] = ()) -> dict[str, Any]:
    """The `code` entry of a result: `files`, relative to the checkout, and `hash`.

    The files are the script, every loaded module of the packages in ROOMS, and `modules` with their imports. `modules`
    names modules that only a child process loads or that are in another package.
    """
    loaded = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    named = {_relative(Path(name)) for name in loaded if name}
    files = {name for name in named if name and name.split("/")[0] in ROOMS}
    named_modules = list(modules)
    files |= {name for path in with_imports(named_modules).values() if (name := _relative(path))}
    script = _relative(Path(sys.argv[0]))
    ordered = sorted(files | ({script} if script else set()))
    return {"files": ordered, "hash": hash_code(ordered)}


def is_current(code: dict[str, Any] | None) -> bool:
    """Whether the code is unchanged since the measurement; False for a result that does not record its code."""
    return code is not None and hash_code(code["files"]) == code["hash"]


def hash_code(files: Iterable[str], root: Path = ROOT) -> str:
    """16 hex characters over the syntax trees of `files`, without docstrings; a missing file counts as empty."""
    digest = hashlib.sha256()
    for name in sorted(files):
        path = root / name
        digest.update(f"\0{name}\0".encode())
        for token in _syntax(ast.parse(path.read_bytes())) if path.is_file() else ():
            digest.update(token.encode() + b"\1")
    return digest.hexdigest()[:16]


def _syntax(node: Any) -> Iterator[str]:
    """Node types and values in order. Skips empty fields, because newer Python versions have more of them."""
    if isinstance(node, list):
        for item in node:
            yield from _syntax(item)
    elif isinstance(node, ast.AST):
        yield type(node).__name__
        for field, value in ast.iter_fields(node):
            kept = _without_docstring(value) if field == "body" and isinstance(value, list) else value
            if kept not in (None, []) and field not in ("kind", "type_comment"):
                yield field
                yield from _syntax(kept)
    else:
        yield repr(node)


def _without_docstring(body: list[Any]) -> list[Any]:
    first = body[0] if body else None
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if is_text else body


def _relative(path: Path) -> str | None:
    """The path relative to the checkout; None for a path outside of it."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None
