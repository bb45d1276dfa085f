"""Makes documents of stored ids: `bos`, ids, `eos`.

A token set begins a new document after every `eos` (actors/data/token_set.py), and rows of packed datasets have
several. So a stored document ends after each of its `eos`, and the rest is another document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moray.actors.data.token_set import TokenVocabulary
from moray.pipelines.shared.arrays import Flags, Indices
from moray.platform.core.errors import InputError


@dataclass(frozen=True)
class Framing:
    """Whether every document must have `bos` or `eos`; otherwise it is added where it is missing."""

    needs_bos: bool
    needs_eos: bool


@dataclass(frozen=True)
class FramedIds:
    """Documents with bos and eos: document n is ids[bounds[n] : bounds[n + 1]], uint32.

    stored [N], part [N]: the stored document, and the number of the document in it. added: number of bos and of eos
    that were missing. split: number of stored documents with an `eos` inside. empty: number of those without ids.
    """

    ids: npt.NDArray[np.uint32]
    bounds: Indices
    stored: Indices
    part: Indices
    added: tuple[int, int]
    split: int
    empty: int


def frame_ids(ids: npt.NDArray[np.uint32], bounds: Indices, vocabulary: TokenVocabulary, framing: Framing) -> FramedIds:
    """Stored document n is ids[bounds[n] : bounds[n + 1]]. Raises UnframedError for one without what it must have."""
    from moray.pipelines.tokenize.best_fit import place_pieces

    ends = np.union1d(np.flatnonzero(ids == vocabulary.eos) + 1, bounds[1:][np.diff(bounds) > 0])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends
    stored = np.searchsorted(bounds, starts, side="right") - 1
    part = np.arange(len(starts)) - np.searchsorted(stored, stored)
    no_bos, no_eos = ids[starts] != vocabulary.bos, ids[ends - 1] != vocabulary.eos
    _require(framing.needs_bos, no_bos, stored, "does not begin with bos", vocabulary.bos)
    _require(framing.needs_eos, no_eos, stored, "does not end with eos", vocabulary.eos)
    sizes = ends - starts
    placed = np.cumsum(sizes + no_bos + no_eos)
    tokens = np.empty(int(placed[-1]) if len(placed) else 0, np.uint32)
    begins = placed - no_eos - sizes
    place_pieces(ids, starts, sizes, tokens, begins)
    tokens[begins[no_bos] - 1], tokens[placed[no_eos] - 1] = vocabulary.bos, vocabulary.eos
    return FramedIds(
        ids=tokens,
        bounds=np.concatenate([[0], placed]).astype(np.int64),
        stored=stored,
        part=part,
        added=(int(no_bos.sum()), int(no_eos.sum())),
        split=int((part == 1).sum()),
        empty=int((np.diff(bounds) == 0).sum()),
    )


class UnframedError(InputError):
    """A document without the token that all must have. document: its number among the stored ones."""

    def __init__(self, message: str, hint: str, document: int) -> None:
        super().__init__(message, hint)
        self.document = document


def _require(needed: bool, missing: Flags, stored: Indices, problem: str, token: int) -> None:
    if needed and missing.any():
        raise UnframedError(
            f"{problem} (id {token})",
            "use the tokenizer that made these ids, or set `add` instead of `present`",
            int(stored[missing.argmax()]),
        )


def document_keys(key: str, first: int, framed: FramedIds) -> Sequence[str]:
    """The key of every document within its source: the file's, the number of the stored document and, from the second
    on, of the document in it."""
    return [
        f"{key}#{n}.{part}" if part else f"{key}#{n}"
        for n, part in zip((framed.stored + first).tolist(), framed.part.tolist(), strict=True)
    ]
