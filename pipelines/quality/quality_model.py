"""A quality model: what it makes of texts, and how it lies on disk (`model.json` and `weights.npy`, no pickle).

Logistic regression over hashed words and word pairs, as fastText's classifiers of web text are in spirit (arXiv
1607.01759): the probability that a text is of the kind of the positive examples.

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

FORMAT = 2  # 2: other hashes of words
_SHAPE, _WEIGHTS = "model.json", "weights.npy"
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Features:
    """n-grams of up to `words` words in `buckets` (a power of two), of a text's first `characters`."""

    words: int
    buckets: int
    characters: int

    def matrix(self, texts: pa.ChunkedArray | pa.Array) -> Any:
        """A scipy CSR matrix, float32 [N, B]."""
        from scipy.sparse import csr_matrix

        from moray.pipelines.quality.features import feature_buckets

        offsets, data = self._read(texts)
        ends = np.zeros(len(offsets), np.int64)
        room = np.empty(self.words * int(offsets[-1] - offsets[0]), np.int32)
        feature_buckets(offsets, data, *tables(), self.words, self.buckets, ends[1:], room)
        sizes = np.diff(ends)
        values = np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes).astype(np.float32)
        made = csr_matrix((values, room[: ends[-1]], ends), shape=(len(sizes), self.buckets))
        made.sum_duplicates()
        return made

    def logits(self, texts: pa.ChunkedArray | pa.Array, weights: npt.NDArray[np.float32]) -> Numbers:
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
        """Of large_string [N]: the probability [N] that each is like the positive examples."""
        scores: Numbers = 1 / (1 + np.exp(-np.clip(self.features.logits(texts, self.weights) + self.bias, -50, 50)))
        return scores

    def save(self, folder: Path, **about: Any) -> None:
        """Writes the model, and what else there is to say about it."""
        np.save(folder / _WEIGHTS, self.weights, allow_pickle=False)
        write_json(folder / _SHAPE, {"format": FORMAT, "bias": self.bias, **asdict(self.features), **about})


@lru_cache(maxsize=2)  # a task's batches, and the tasks of a worker, use one
def load_quality_model(folder: Path) -> QualityModel:
    """Raises InputError if there is no model there that this version reads."""
    try:
        shape = json.loads((folder / _SHAPE).read_text())
        weights = np.load(folder / _WEIGHTS, allow_pickle=False)
        if shape["format"] != FORMAT or weights.shape != (shape["buckets"],):
            raise ValueError(f"format {shape['format']}, {weights.shape} weights")
        features = Features(shape["words"], shape["buckets"], shape["characters"])
        return QualityModel(features, weights.astype(np.float32), float(shape["bias"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} holds no quality model: {error}", "make it anew with the step quality-model"
        ) from error
