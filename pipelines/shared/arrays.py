"""Names of the arrays that text steps pass around, and files of one array."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moray.platform.core.atomic import whole_file

Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]  # places, numbers, counts
Keys = npt.NDArray[np.uint64]  # hashes
Scores = npt.NDArray[np.float64]


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Writes an .npy file, whole or not at all."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def mapped(path: Path) -> npt.NDArray[Any]:
    """The array of an .npy file, mapped and not read."""
    array: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    return array
