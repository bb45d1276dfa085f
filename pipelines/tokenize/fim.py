"""Fill-in-the-middle (FIM): moves the middle of documents to the end, so that a model learns to infill.

DeepSeek-V3 (4.1) does so with a tenth of the documents, in the order prefix, suffix, middle. The choice of documents
and the split points depend only on the document id, not on the layout of the corpus or the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from moray.pipelines.tokenizer.encoders import Encoded
from moray.pipelines.tokenizer.train import FIM
from moray.platform.core.errors import InputError

Int64 = npt.NDArray[np.int64]

_DEEPSEEK = ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>")


@dataclass(frozen=True)
class Marks:
    """Ids of the FIM tokens: `begin` before the prefix, `hole` before the suffix, `end` before the middle."""

    begin: int
    hole: int
    end: int


def fim_marks(tokenizer: Any) -> Marks:
    """The FIM tokens of a `tokenizers.Tokenizer`, Moray's or DeepSeek's. Raises InputError if it has none."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    for names in (FIM, _DEEPSEEK):
        if all(name in ids for name in names):
            return Marks(*(ids[name] for name in names))
    raise InputError("tokenize.fim_rate: the tokenizer has no FIM tokens", "set tokenizer.fim to true")


def is_chosen(name: str, rate: float) -> bool:
    """Whether the document with this id is rearranged."""
    return _uniform("chosen", name) < rate


def cut(name: str, text: str) -> tuple[str, str, str]:
    """(prefix, middle, suffix) of the document with this id, split between characters; each may be empty."""
    first, second = sorted(int(_uniform(key, name) * (len(text) + 1)) for key in ("first", "second"))
    return text[:first], text[first:second], text[second:]


def _uniform(key: str, name: str) -> float:
    """A pseudo-random number in [0, 1) that depends on `key` and the document id."""
    return xxhash.xxh3_64_intdigest(f"fim/{key}/{name}".encode()) / 2**64


def rearranged(names: Sequence[str], texts: pa.Array, rate: float) -> tuple[pa.Array, Int64]:
    """(texts, number of texts of each document): a chosen document has three texts, its prefix, suffix and middle; any
    other document has one."""
    chosen = {n: cut(name, texts[n].as_py()) for n, name in enumerate(names) if is_chosen(name, rate)}
    counts = np.ones(len(names), np.int64)
    if not chosen:
        return texts, counts
    counts[list(chosen)] = 3
    pieces = [piece for prefix, middle, suffix in chosen.values() for piece in (prefix, suffix, middle)]
    order = np.repeat(np.arange(len(names)), counts)
    order[np.repeat(counts == 3, counts)] = len(names) + np.arange(len(pieces))
    return pa.concat_arrays([texts, pa.array(pieces, texts.type)]).take(pa.array(order)), counts


def framed(encoded: Encoded, counts: Int64, bos: int, eos: int, marks: Marks | None) -> Encoded:
    """Documents with bos and eos, and FIM tokens in those of three pieces: begin, prefix, hole, suffix, end, middle.

    counts [N]: number of pieces of `encoded` of each document, 1 or 3.
    """
    from moray.pipelines.tokenize.best_fit import place_pieces

    first = np.cumsum(counts) - counts
    last, middle = first + counts - 1, first[counts == 3]
    before, after = np.ones(len(encoded.bounds) - 1, np.int64), np.zeros(len(encoded.bounds) - 1, np.int64)
    before[middle], after[last] = 2, 1
    ends = np.cumsum(before + np.diff(encoded.bounds) + after)
    starts = ends - after - np.diff(encoded.bounds)
    tokens = np.empty(ends[-1] if len(ends) else 0, np.uint32)
    place_pieces(encoded.ids, encoded.bounds[:-1], np.diff(encoded.bounds), tokens, starts)
    tokens[starts[first] - before[first]], tokens[ends[last] - 1] = bos, eos
    if marks is not None:
        for piece, mark in enumerate((marks.begin, marks.hole, marks.end)):
            tokens[starts[middle + piece] - 1] = mark
    return Encoded(tokens, np.concatenate([[0], ends[last]]))
