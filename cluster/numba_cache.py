"""numba's cache folder, with one subfolder per state of the compiled source files.

numba checks only the file of a cached function, not the files of functions it calls. After a change there it would run
stale code. So the subfolder is named by a hash over every file that imports numba and every Moray file they import.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from moray.platform.plan.code_hash import hash_sources, imports_of, with_imports

_PACKAGES = ("kernels", "models", "actors", "pipelines")


def numba_cache(default: Path) -> Path:
    """Returns the folder for the current code, below `NUMBA_CACHE_DIR` if that is set, or else below `default`."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    code = hash_sources(compiled_files())
    if not given:
        return default / code
    return Path(given) if Path(given).name == code else Path(given) / code


@cache
def compiled_files() -> dict[str, Path]:
    """Returns every module with numba functions, and every module these import: name -> source file."""
    import moray

    checkout = Path(moray.__path__[0])
    paths = [path for package in _PACKAGES for path in sorted((checkout / package).rglob("*.py"))]
    # Parsing is slow, so skip files that do not contain the word.
    named = [path for path in paths if b"numba" in path.read_bytes()]
    compiled = [path for path in named if any(name.split(".")[0] == "numba" for name in imports_of(path))]
    return with_imports("moray." + ".".join(path.relative_to(checkout).with_suffix("").parts) for path in compiled)
