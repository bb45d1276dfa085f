"""moray: one import package over this repository's top-level folders.

`import moray.kernels`, `import moray.platform.plan.recipe` and so on work from a bare clone, an editable install, a
wheel and a Ray `working_dir`: the package's path is this file's own folder (in a wheel, the installed `moray/`
folder beside it). No top-level folder has an `__init__.py`: `platform/__init__.py` would shadow the standard
library's `platform`, `kernels/__init__.py` another distribution. That leaves `moray.models` without a file to hold
its two public functions, so they are declared here.
"""

import sys
import types
from pathlib import Path

__version__ = "0.1.0"

_home = Path(__file__).resolve().parent
if (_home / "moray").is_dir():
    _home = _home / "moray"
__path__ = [str(_home)]


def _load(folder, **options):
    """Reads a Hugging Face DeepSeek-V3 folder; see `moray.models.checkpoint.load`."""
    from moray.models import checkpoint

    return checkpoint.load(folder, **options)


def _save(model, folder, precision="float32"):
    """Writes a Hugging Face DeepSeek-V3 folder; see `moray.models.checkpoint.save`."""
    from moray.models import checkpoint

    return checkpoint.save(model, folder, precision)


models = types.ModuleType("moray.models", "The DeepSeek-V3 family: `load(folder)`, `save(model, folder, precision)`.")
models.__path__ = [str(_home / "models")]
models.load, models.save = _load, _save
sys.modules["moray.models"] = models

if __name__ == "__main__":
    from moray.platform.cli.main import main

    main()
