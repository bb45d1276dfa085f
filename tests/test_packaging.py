"""Checks of the layout: one import package over fixed top-level folders, and the allowed imports between packages."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.checkout import ROOT

PACKAGES = ("kernels", "models", "actors", "pipelines", "platform", "cluster")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "actors": {"actors", "models", "kernels", "platform"},
    "pipelines": {"pipelines", "actors", "models", "kernels", "platform"},
    "cluster": {"cluster", "platform", "models"},
    "platform": {"platform"},
}
# The composition root: these files start everything, so they import higher packages, lazily.
COMPOSITION_ROOT = {
    "platform/api.py": {"cluster", "pipelines"},
    "platform/control/driver.py": {"cluster"},
    "platform/control/options.py": {"cluster"},
    "platform/control/services.py": {"cluster"},
    "platform/server/app.py": {"cluster"},
}
# Layers inside a package, lowest first. A file may import lower layers and, in its own layer, its own folder.
LAYERS: dict[str, list[set[str]]] = {
    "platform": [
        {"core"}, {"store"}, {"plan"}, {"run"}, {"control"}, {"api"}, {"client", "server"}, {"cli"},
    ],
    "pipelines": [
        {"shared"}, {"text"},
        {"corpus", "quality", "split", "tokenizer"},
        {"coverage", "decontaminate", "dedup", "evaluate", "filter", "import_model", "pretrain", "serve", "synthesize",
         "tokenize"},
        {"deploy", "export", "register", "tasks"},
    ],
}  # fmt: skip
# Modules that a package must be importable without; no import anywhere, not even inside functions.
NEVER = {"kernels": {"ray", "deepspeed", "mlflow"}, "models": {"ray", "deepspeed", "mlflow"}}
# Modules that a package must not import at import time (imports inside functions are allowed).
NOT_AT_IMPORT = {"platform": {"torch", "ray", "mlflow"}, "cluster": {"torch", "ray", "mlflow"}}
PURE = {"models/config.py", "models/presets.py", "models/tensors.py"}  # read by the planner, without torch


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(nodes: list[ast.stmt] | ast.Module, everywhere: bool) -> Iterator[str]:
    """Yields dotted names that a module imports: anywhere, or only at import time."""
    tree = nodes if isinstance(nodes, ast.Module) else ast.Module(nodes, [])
    waiting = list(ast.iter_child_nodes(tree))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.expr) or (not everywhere and runs_later(node)):
            continue  # expressions contain no statements
        waiting += list(ast.iter_child_nodes(node))


def test_imports_go_down_only() -> None:
    wrong = []
    for path in sources():
        name, tree = path.relative_to(ROOT).as_posix(), parsed(path)
        package = name.partition("/")[0]
        packages = {module.split(".")[1] for module in imported(tree, True) if module.startswith("moray.")}
        tops, at_import = ({module.split(".")[0] for module in imported(tree, every)} for every in (True, False))
        barred = {"torch"} if name in PURE else NOT_AT_IMPORT.get(package, set())
        found = packages - MAY_IMPORT[package] - COMPOSITION_ROOT.get(name, set())
        found |= tops & NEVER.get(package, set()) | at_import & barred
        wrong += [f"{name} imports {one}" for one in sorted(found)]
    assert wrong == []


def test_imports_go_to_lower_layers_only() -> None:
    wrong = []
    for package, layers in LAYERS.items():
        level = {name: i for i, names in enumerate(layers) for name in names}
        assert {path.stem for path in (ROOT / package).glob("*.py")} | folders(ROOT / package) == set(level)
        for path in sorted((ROOT / package).rglob("*.py")):
            own = path.relative_to(ROOT).with_suffix("").parts[1]
            for name in imported(parsed(path), True):
                parts = name.split(".")[1:]
                if parts[:1] == [package] and parts[1] != own and level[parts[1]] >= level[own]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def folders(package: Path) -> set[str]:
    """The subfolders with Python files."""
    return {path.relative_to(package).parts[0] for path in package.rglob("*.py") if path.parent != package}


def test_every_module_has_a_docstring() -> None:
    without = [path.relative_to(ROOT) for path in sources() if not ast.get_docstring(parsed(path))]
    assert without == []


def test_a_public_name_is_defined_once() -> None:
    """A search for a public class or function finds one definition. `main` is the entry point of scripts."""
    homes: dict[str, list[str]] = {}
    for path in sources():
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
                homes.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: found for name, found in homes.items() if len(found) > 1 and name != "main"} == {}


def test_no_folder_shadows_another_package() -> None:
    """`platform/__init__.py` would break the standard library's `platform` for Python and every Ray worker."""
    folders = [ROOT / package for package in (*PACKAGES, "recipes", "benchmarks", "docs")]
    folders += [path for path in (ROOT / "tests").rglob("*") if path.is_dir()] + [ROOT / "tests"]
    assert not [folder for folder in folders if (folder / "__init__.py").exists()]


def test_package_list_equals_the_disk() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {path.parent.relative_to(ROOT) for path in sources()} | {Path("recipes")}
    listed = {"moray." + ".".join(folder.parts): folder.as_posix() for folder in on_disk}
    assert set(setuptools["packages"]) == set(listed)
    assert setuptools["package-dir"] == listed


def test_a_wheel_carries_the_page() -> None:
    """platform/server/page has no Python file, so it is not a package."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    carried = {
        path for pattern in data["moray.platform.server"] for path in (ROOT / "platform" / "server").glob(pattern)
    }
    assert {path for path in (ROOT / "platform" / "server" / "page").rglob("*") if path.is_file()} <= carried


def test_a_wheel_carries_files_beside_the_code() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    data = setuptools["package-data"]
    for package, folder in setuptools["package-dir"].items():
        patterns = [*data["*"], *data.get(package, []), "*.py"]
        carried = {path for pattern in patterns for path in (ROOT / folder).glob(pattern)}
        assert {path for path in (ROOT / folder).iterdir() if path.is_file()} <= carried


def runs_later(node: ast.AST) -> bool:
    """Whether a node runs after import: a function's body, or a block for the type checker only."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.dump(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.heavy
def test_kernels_and_models_import_without_ray_deepspeed_and_mlflow() -> None:
    modules = [
        "moray." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("kernels", "models")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    done = run_python(
        "import importlib, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('ray', 'deepspeed', 'mlflow', 'transformers'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print('ok')"
    )
    assert done.stdout.strip() == "ok", done.stderr


def test_the_command_line_starts_without_heavy_imports() -> None:
    done = run_python(
        "import sys\n"
        "from moray.platform.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "loaded = {'torch', 'ray', 'mlflow', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout


def test_planning_loads_neither_torch_nor_ray_nor_mlflow() -> None:
    done = run_python(
        "import sys\n"
        "from moray.platform.api import open_recipe\n"
        "open_recipe('quickstart')\n"
        "loaded = {'torch', 'ray', 'mlflow'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", [ROOT, Path("/")], ids=["checkout", "installed"])
def test_the_root_module_is_found(folder: Path) -> None:
    """From a bare clone and, elsewhere, through the editable install, which must not hide moray.py."""
    code = "import moray.models as m, moray; print(callable(m.load), callable(m.save), moray.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.split()[:2] == ["True", "True"], done.stderr
