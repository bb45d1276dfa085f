"""Array types of the text steps, and files that hold one array."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moray.platform.core.atomic import whole_file

Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]  # positions, indices, counts
Keys = npt.NDArray[np.uint64]  # hashes
Scores = npt.NDArray[np.float64]


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Writes an .npy file atomically."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def mapped(path: Path) -> npt.NDArray[Any]:
    """The memory-mapped array of an .npy file."""
    array: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    return array
