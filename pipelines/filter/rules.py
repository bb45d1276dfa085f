"""Application of the rules to a column of texts: the broken limit of each removed document, and the edited texts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.filter.character_kinds import table
from moray.pipelines.filter.config import EMPTY, FAMILIES, RulesConfig, reason
from moray.pipelines.text.arrow import text_buffers

if TYPE_CHECKING:
    from moray.pipelines.filter.kernel import RuleArrays


@dataclass(frozen=True)
class FilteredDocuments:
    """The results for N documents. reasons: [N], None for kept documents. values, limits: the measured value and the
    broken limit of removed documents, [N]. texts: large_string [N], after the rules."""

    reasons: list[str | None]
    values: npt.NDArray[np.float64]
    limits: npt.NDArray[np.float64]
    texts: pa.Array


def apply_rules(texts: pa.ChunkedArray, config: RulesConfig) -> FilteredDocuments:
    """Applies the rules to texts, large_string [N]. The resulting text of a removed document is undefined."""
    from moray.pipelines.filter import kernel

    offsets, data = text_buffers(texts)
    count, size = len(offsets) - 1, int(offsets[-1] - offsets[0])
    edits = "c4" in config.rules
    results = kernel.RuleResults(
        np.empty(count, np.int8),
        np.empty(count, np.int8),
        np.empty(count),
        np.empty(size if edits else 0, np.uint8),
        np.zeros(count + 1, np.int64),
    )
    longest = int(np.diff(offsets).max(initial=0))
    rules = _rules(config)
    buffer, edited, counts = kernel.allocate_buffers(longest)
    edit_buffer = edited if config.rules != ("basic",) else None
    kernel.check_texts(offsets, data, table(), rules, buffer, edit_buffer, counts, results, edits)
    if edits:
        bounds, text = pa.py_buffer(results.ends), pa.py_buffer(results.text[: results.ends[-1]])
        after = pa.Array.from_buffers(pa.large_string(), count, [None, bounds, text])
    else:
        after = pa.concat_arrays(texts.chunks) if texts.num_chunks else pa.array([], pa.large_string())
    broken = results.limits >= 0
    limits = np.zeros(count)
    limits[broken] = rules.limits[results.families[broken], results.limits[broken]]
    return FilteredDocuments(_reasons(results.families, results.limits), results.values, limits, after)


def _reasons(families: npt.NDArray[np.int8], limits: npt.NDArray[np.int8]) -> list[str | None]:
    """The reasons for pairs of family and limit, as in kernel.RuleResults."""
    return [
        None if limit == -1 else EMPTY if limit < 0 else reason(FAMILIES[family], limit)
        for family, limit in zip(families.tolist(), limits.tolist(), strict=True)
    ]


@lru_cache(maxsize=8)
def _rules(config: RulesConfig) -> RuleArrays:
    from moray.pipelines.filter.c4 import PHRASES
    from moray.pipelines.filter.kernel import RuleArrays

    by_family = [config.limits(family) for family in FAMILIES]
    limits = np.full((len(FAMILIES), max(map(len, by_family))), np.nan)
    for row, own in zip(limits, by_family, strict=True):
        row[: len(own)] = own
    stop_words = tuple(dict.fromkeys(config.gopher_quality.stop_words))
    return RuleArrays(
        families=np.array([FAMILIES.index(family) for family in config.rules], np.int64),
        limits=limits,
        sizes=np.array([len(own) for own in by_family], np.int64),
        stop_words=_codes(stop_words),
        stop_word_bounds=_bounds(stop_words),
        phrases=_codes(PHRASES),
        phrase_bounds=_bounds(PHRASES),
    )


def _codes(words: tuple[str, ...]) -> npt.NDArray[np.uint32]:
    return np.array([ord(character) for character in "".join(words)], np.uint32)


def _bounds(words: tuple[str, ...]) -> npt.NDArray[np.int64]:
    return np.cumsum([0, *map(len, words)], dtype=np.int64)
