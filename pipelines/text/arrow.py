"""Text as it lies in Arrow's memory, for kernels that need no Python string."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Integers = npt.NDArray[np.int64]


def text_buffers(texts: pa.Array | pa.ChunkedArray) -> tuple[Integers, npt.NDArray[np.uint8]]:
    """Arrow's own memory of a column of strings: where each text begins, with the end of the last, and the bytes."""
    array: Any = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    if isinstance(array, pa.ChunkedArray):  # no chunk at all
        array = pa.array([], pa.large_string())
    if array.type != pa.large_string():
        array = array.cast(pa.large_string())
    _, offsets, data = array.buffers()
    if not len(array):
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    begin = array.offset
    return (
        np.frombuffer(offsets, np.int64)[begin : begin + len(array) + 1],
        np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(0, np.uint8),
    )
