"""The files of a Hugging Face folder that hold the model. Pure Python: the plan of an import reads it without torch.

All code that reads, checks or copies a model uses transformers' rule: `model.safetensors` if it exists, even if there
is an index beside it (saving twice leaves such an index), else the files named by the index, in the folder or below it.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def model_files(folder: Path) -> list[str]:
    """Names of config, index and weights in the folder, weights last.

    Raises FileNotFoundError or ValueError with the name of the missing or invalid file.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {CONFIG}")
    indexed = _indexed(folder / INDEX) if (folder / INDEX).is_file() else []
    if (folder / SINGLE).is_file() or not indexed:
        return [CONFIG, *_present(folder, [SINGLE])]
    return [CONFIG, INDEX, *_present(folder, indexed)]


def weight_files(folder: Path) -> list[str]:
    """The files of `model_files` that hold tensors."""
    return [name for name in model_files(folder) if name not in (CONFIG, INDEX)]


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises FileNotFoundError or ValueError with its name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} is not a model folder: it has no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _indexed(index: Path) -> list[str]:
    """The files named by an index, sorted."""
    found = read_object(index).get("weight_map")
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{index}: weight_map must be an object that gives each tensor its file")
    for tensor, name in found.items():
        if not isinstance(name, str) or not _is_inside(name):
            raise ValueError(
                f"{index}: weight_map puts tensor {tensor!r} into {name!r}, which is not a file of the folder"
            )
    return sorted(set(found.values()))


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name
    )


def _present(folder: Path, names: list[str]) -> list[str]:
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks the weights in {name}")
    return names
