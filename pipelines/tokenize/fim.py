"""Fill in the middle: documents whose middle comes last, so that a model learns to write what lies between two texts.

DeepSeek-V3 (4.1): a tenth of the documents, as prefix, suffix, middle. Where a document is cut, and whether, follows
from its id, so that neither the layout of the corpus nor the number of workers has a say.
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
    """Ids of the tokens before the prefix, before the suffix and before the middle."""

    begin: int
    hole: int
    end: int


def fim_marks(tokenizer: Any) -> Marks:
    """Those of a `tokenizers.Tokenizer`, ours or DeepSeek's. Raises InputError if it has none."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    for names in (FIM, _DEEPSEEK):
        if all(name in ids for name in names):
            return Marks(*(ids[name] for name in names))
    raise InputError("tokenize.fim_rate: the tokenizer has no tokens for it", "set tokenizer.fim: true")


def is_chosen(name: str, rate: float) -> bool:
    """Whether the document with this id has its middle last."""
    return _chance("chosen", name) < rate


def cut(name: str, text: str) -> tuple[str, str, str]:
    """(prefix, middle, suffix) of the document with this id, cut between characters; each may be empty."""
    first, second = sorted(int(_chance(what, name) * (len(text) + 1)) for what in ("first", "second"))
    return text[:first], text[first:second], text[second:]


def _chance(what: str, name: str) -> float:
    return xxhash.xxh3_64_intdigest(f"fim/{what}/{name}".encode()) / 2**64


def rearranged(names: Sequence[str], texts: pa.Array, rate: float) -> tuple[pa.Array, Int64]:
    """The texts, of a chosen document its prefix, suffix and middle as three; and how many each document has."""
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
    """The tokens of documents between bos and eos, those of three pieces with their marks: begin, prefix, hole, suffix,
    end, middle. counts [N]: how many pieces of `encoded` each document has, 1 or 3."""
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
