"""The quality model: features, scores and the format on disk (`model.json` and `weights.npy`, no pickle).

Logistic regression over hashed words and word pairs, similar to fastText's text classifiers (arXiv 1607.01759). The
score is the probability that a text belongs to the class of the positive examples.

Shapes: N documents, B buckets.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moray.pipelines.text.arrow import text_buffers
from moray.pipelines.text.characters import tables
from moray.platform.core.atomic import write_json
from moray.platform.core.errors import InputError
from moray.platform.store.paths import AnyPath, local_folder

FORMAT = 2  # 2: new word hash
_SHAPE, _WEIGHTS = "model.json", "weights.npy"
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Features:
    """N-grams of up to `words` words in the first `characters` of a text, hashed to `buckets` (a power of two)."""

    words: int
    buckets: int
    characters: int

    def matrix(self, texts: pa.ChunkedArray | pa.Array) -> Any:
        """The features as a scipy CSR matrix, float32 [N, B]."""
        from scipy.sparse import csr_matrix

        from moray.pipelines.quality.features import feature_buckets

        offsets, data = self._read(texts)
        ends = np.zeros(len(offsets), np.int64)
        buckets = np.empty(self.words * int(offsets[-1] - offsets[0]), np.int32)
        feature_buckets(offsets, data, *tables(), self.words, self.buckets, ends[1:], buckets)
        sizes = np.diff(ends)
        values = np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes).astype(np.float32)
        matrix = csr_matrix((values, buckets[: ends[-1]], ends), shape=(len(sizes), self.buckets))
        matrix.sum_duplicates()
        return matrix

    def logits(self, texts: pa.ChunkedArray | pa.Array, weights: npt.NDArray[np.float32]) -> Numbers:
        """The dot products of the features of each text and the weights [B], float64 [N]."""
        from moray.pipelines.quality.features import logits

        offsets, data = self._read(texts)
        found = np.empty(len(offsets) - 1)
        logits(offsets, data, *tables(), self.words, weights, found)
        return found

    def _read(self, texts: pa.ChunkedArray | pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        return text_buffers(pc.utf8_slice_codeunits(texts, 0, self.characters))


@dataclass(frozen=True)
class QualityModel:
    features: Features
    weights: npt.NDArray[np.float32]
    bias: float

    def scores(self, texts: pa.ChunkedArray | pa.Array) -> Numbers:
        """The probability [N] that each text, large_string [N], belongs to the class of the positive examples."""
        scores: Numbers = 1 / (1 + np.exp(-np.clip(self.features.logits(texts, self.weights) + self.bias, -50, 50)))
        return scores

    def save(self, folder: Path, **about: Any) -> None:
        """Writes the model. about: further entries of `model.json`."""
        np.save(folder / _WEIGHTS, self.weights, allow_pickle=False)
        write_json(folder / _SHAPE, {"format": FORMAT, "bias": self.bias, **asdict(self.features), **about})


@lru_cache(maxsize=2)  # shared by the batches of a task and the tasks of a worker
def load_quality_model(folder: AnyPath) -> QualityModel:
    """Loads a model. Raises InputError if the folder has no model of this format."""
    try:
        with local_folder(folder) as local:
            shape = json.loads((local / _SHAPE).read_text())
            weights = np.load(local / _WEIGHTS, allow_pickle=False)
        if shape["format"] != FORMAT or weights.shape != (shape["buckets"],):
            raise ValueError(f"format {shape['format']}, {weights.shape} weights")
        features = Features(shape["words"], shape["buckets"], shape["characters"])
        return QualityModel(features, weights.astype(np.float32), float(shape["bias"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} contains no readable quality model: {error}", "train it again with the step quality-model"
        ) from error
