"""Packing of documents into sequences of one length: best fit, which splits few documents, or concatenation.

Best fit (Ding et al. 2024, Fewer Truncations Improve Language Modeling, arXiv 2404.10830): a document that is longer
than a sequence is split into full sequences and a remainder. Remainders and shorter documents are placed, the longest
first, each into the sequence with the least free space that can hold it. A tree over free space finds that sequence, so
n documents take O(n log length). The result depends only on the documents' lengths and order.

Notable: sequences are about 99.9 % full for any distribution of lengths. If best fit leaves more padding, the emptiest
sequences are dissolved, and their pieces are split to fill the padding of others (fill_holes.py). At most every
fiftieth piece is split for less than a hundredth of a sequence. A piece always ends with its document or with its
sequence, so readers can find document boundaries (actors/data/token_set.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.actors.data.token_set import TokenVocabulary
from moray.pipelines.tokenize.fill_holes import PackedBins, fill_holes

Packing = Literal["best-fit", "concatenate"]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlacedPieces:
    """Positions of pieces of documents in the sequences: arrays [P], ordered by `start`.

    document: document number. begin: offset of the piece in its document. tokens: length. start: position in the
    concatenated sequences. sequences: number of sequences.
    """

    document: Int64
    begin: Int64
    tokens: Int64
    start: Int64
    sequences: int

    def cut(self, length: int) -> int:
        """Number of documents that are split over several sequences."""
        several = self.start // length != (self.start + self.tokens - 1) // length
        documents, pieces = np.unique(self.document, return_counts=True)
        return len(np.union1d(documents[pieces > 1], self.document[several]))


@dataclass(frozen=True)
class TokenDocuments:
    """N documents as tokens, with bos and eos: document n is tokens[bounds[n] : bounds[n + 1]].

    sizes: UTF-8 bytes of each.
    """

    names: Sequence[str]
    sizes: Int64
    tokens: npt.NDArray[np.uint32]
    bounds: Int64


def plan_sequences(lengths: Int64, length: int, packing: Packing) -> PlacedPieces:
    """Assigns documents of `lengths` tokens, all positive, to sequences of `length` tokens."""
    if packing == "best-fit":
        return _best_fit_pieces(lengths, length)
    starts = np.cumsum(lengths) - lengths
    documents = np.arange(len(lengths), dtype=np.int64)
    return PlacedPieces(documents, np.zeros_like(lengths), lengths, starts, -(-int(lengths.sum()) // length))


def _best_fit_pieces(lengths: Int64, length: int) -> PlacedPieces:
    """First the full sequences of long documents, document after document, then the sequences packed by best fit."""
    from moray.pipelines.tokenize.best_fit import best_fit

    full, rest = lengths // length, lengths % length
    first = int(full.sum())
    short = np.flatnonzero(rest)
    tokens = rest[short]
    sequence, at = np.empty_like(tokens), np.empty_like(tokens)
    free = best_fit(tokens, np.argsort(-tokens, kind="stable"), length, sequence, at)
    parts, count = fill_holes(PackedBins(tokens, sequence, at, free, length))
    long, of = np.flatnonzero(full), short[parts.piece]
    document = np.concatenate([long, of])
    begin = np.concatenate([np.zeros(len(long), np.int64), full[of] * length + parts.skipped])
    start = np.concatenate([(np.cumsum(full) - full)[long] * length, (first + parts.sequence) * length + parts.at])
    tokens = np.concatenate([full[long] * length, parts.tokens])
    order = np.argsort(start, kind="stable")
    return PlacedPieces(document[order], begin[order], tokens[order], start[order], first + count)


def pack_documents(
    documents: TokenDocuments, pieces: PlacedPieces, length: int, vocabulary: TokenVocabulary
) -> tuple[npt.NDArray[np.unsignedinteger], pa.Table]:
    """The sequences, [sequences, length] in the vocabulary's dtype, and the table of their pieces (docs/formats.md).

    Raises ValueError if a token id is not below the vocabulary's size.
    """
    from moray.pipelines.tokenize.best_fit import place_pieces

    ids, bounds = documents.tokens, documents.bounds
    if ids.max(initial=0) >= vocabulary.size:
        n = int(np.searchsorted(bounds, ids.argmax(), side="right")) - 1
        own = ids[bounds[n] : bounds[n + 1]]
        raise ValueError(
            f"document {documents.names[n]}: token ids {own.min()}..{own.max()} outside 0..{vocabulary.size - 1}"
        )
    packed = np.full(pieces.sequences * length, vocabulary.pad, vocabulary.dtype)
    place_pieces(ids, bounds[pieces.document] + pieces.begin, pieces.tokens, packed, pieces.start)
    parts = np.bincount(pieces.document, minlength=len(documents.names))[pieces.document]
    by_document = np.lexsort((pieces.begin, pieces.document))
    part = np.empty(len(by_document), np.int64)
    first = np.flatnonzero(pieces.begin[by_document] == 0)
    part[by_document] = np.arange(len(part)) - np.repeat(first, parts[by_document][first])
    table = pa.table(
        {
            "id": pa.array(documents.names, pa.string()).take(pa.array(pieces.document)),
            "part": pa.array(part, pa.int32()),
            "parts": pa.array(parts, pa.int32()),
            "start": pa.array(pieces.start, pa.int64()),
            "tokens": pa.array(pieces.tokens, pa.int64()),
            "bytes": pa.array(np.where(part == 0, documents.sizes[pieces.document], 0), pa.int64()),
        }
    )
    return packed.reshape(-1, length), table
