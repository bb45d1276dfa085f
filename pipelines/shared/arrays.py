"""Array types of the text steps, and files that hold one array."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from moray.platform.store.paths import AnyPath, local_file, new_file, read_range

Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]  # positions, indices, counts
Keys = npt.NDArray[np.uint64]  # hashes
Scores = npt.NDArray[np.float64]


def save_array(path: AnyPath, array: npt.NDArray[Any]) -> None:
    """Writes an .npy file atomically."""
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def load_array(path: AnyPath) -> npt.NDArray[Any]:
    """The array of an .npy file, in memory."""
    with local_file(path) as local:
        array: npt.NDArray[Any] = np.load(local)
        return array


def array_part(
    path: AnyPath, dtype: type[np.generic], shape: tuple[int, int], row: int, part: slice
) -> npt.NDArray[Any]:
    """A part of one row of an .npy file with an array of this dtype and shape, in memory. Reads only these bytes."""
    header = io.BytesIO()
    kind = np.dtype(dtype)
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    )
    begin, end = (header.tell() + (row * shape[1] + at) * kind.itemsize for at in (part.start, part.stop))
    return np.frombuffer(read_range(path, begin, end), kind)


def mapped(path: AnyPath) -> npt.NDArray[Any]:
    """The memory-mapped array of an .npy file."""
    with local_file(path) as local:
        array: npt.NDArray[Any] = np.load(local, mmap_mode="r")
        return array
