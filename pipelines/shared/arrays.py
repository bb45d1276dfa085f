"""Names of the arrays that text steps pass around."""

import numpy as np
import numpy.typing as npt

Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]  # places, numbers, counts
Keys = npt.NDArray[np.uint64]  # hashes
Scores = npt.NDArray[np.float64]
