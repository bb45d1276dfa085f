"""Documents of token ids as files hold them, and the errors of files that hold something else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moray.actors.data.token_set import TokenVocabulary
from moray.pipelines.corpus.source_file import File
from moray.pipelines.shared.arrays import Indices
from moray.platform.core.errors import InputError

READ_BYTES = 16 << 20  # of ids that a reader returns at once, unless one document has more
LARGEST_DOCUMENT = 1 << 28  # ids; a longer document is a file without document boundaries


@dataclass(frozen=True)
class StoredIds:
    """Consecutive documents of a file: document `first + n` is ids[bounds[n] : bounds[n + 1]]. ids: any number type."""

    first: int
    ids: npt.NDArray[Any]
    bounds: Indices


def read_exactly(file: File, begin: int, size: int) -> bytes:
    """Bytes [begin, begin + size) of a file. Raises InputError if it ends before."""
    with file.open() as opened:
        opened.seek(begin)
        data: bytes = opened.read(size)
    if len(data) < size:
        raise InputError(f"{file.location} ends at byte {begin + len(data)}, not {begin + size}", "copy it again")
    return data


def checked_ids(stored: StoredIds, vocabulary: TokenVocabulary, where: str) -> npt.NDArray[np.uint32]:
    """The ids as uint32. Raises InputError for one that is not an id of the vocabulary, or is its padding.

    where: the file, for the message.
    """
    ids = stored.ids
    with np.errstate(invalid="ignore"):
        wrong = (ids < 0) | (ids >= vocabulary.size)
        if ids.dtype.kind == "f":
            wrong |= ids != np.floor(ids)  # true for NaN
    if wrong.any():
        reason = f"is outside the vocabulary of {vocabulary.size} tokens"
        raise _wrong_id(stored, int(wrong.argmax()), where, reason, "use the tokenizer that made these ids")
    padding = ids == vocabulary.pad
    if padding.any():
        hint = "remove padding from the data, or set `pad` of load-tokenizer to a token that no document has"
        raise _wrong_id(stored, int(padding.argmax()), where, "is the padding token", hint)
    return ids.astype(np.uint32)


def _wrong_id(stored: StoredIds, at: int, where: str, reason: str, hint: str) -> InputError:
    n = int(np.searchsorted(stored.bounds, at, side="right")) - 1
    place = f"document {stored.first + n}, position {at - int(stored.bounds[n])}"
    return InputError(f"{where}: {place}: id {stored.ids[at]} {reason}", hint)
