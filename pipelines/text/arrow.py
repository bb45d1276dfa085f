"""Access to text in Arrow's buffers, for kernels that work without Python strings."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Integers = npt.NDArray[np.int64]


def text_buffers(texts: pa.Array | pa.ChunkedArray) -> tuple[Integers, npt.NDArray[np.uint8]]:
    """Arrow's buffers of a string column of N texts, not copied: offsets, int64 [N + 1], and UTF-8 bytes, uint8."""
    array: Any = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    if isinstance(array, pa.ChunkedArray):  # without any chunk
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
