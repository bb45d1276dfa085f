"""The folder that numba keeps compiled functions in: one for each state of the source files that they are made of.

numba looks at the file of a function, and not at those of the functions that it calls: after a change there it would
run what it compiled before. So the folder is named by the contents of every file that imports numba, and of every file
of ours that these import.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from moray.platform.plan.code_hash import hash_sources, imports_of, with_imports

_ROOMS = ("kernels", "models", "actors", "pipelines")


def numba_cache(default: Path) -> Path:
    """The folder for the code as it is: below `NUMBA_CACHE_DIR`, where that is set, or else below `default`."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    state = hash_sources(compiled_files())
    if not given:
        return default / state
    return Path(given) if Path(given).name == state else Path(given) / state


@cache
def compiled_files() -> dict[str, Path]:
    """Every module that holds functions for numba, and what these modules import: name -> source file."""
    import moray

    home = Path(moray.__path__[0])
    paths = [path for room in _ROOMS for path in sorted((home / room).rglob("*.py"))]
    # Parsing is what takes long, so only files that hold the word at all are parsed.
    named = [path for path in paths if b"numba" in path.read_bytes()]
    compiled = [path for path in named if any(name.split(".")[0] == "numba" for name in imports_of(path))]
    return with_imports("moray." + ".".join(path.relative_to(home).with_suffix("").parts) for path in compiled)
