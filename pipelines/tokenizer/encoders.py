"""Encoding of text to token ids: with gigatoken if it gives the same ids as Hugging Face `tokenizers`, else with that.

`tokenizers` is the reference. gigatoken is tens of times as fast but supports only common split patterns. So before a
step uses gigatoken, it is compared with the reference on documents and on test texts (`choose_encoder`). Texts with a
character that this Python's Unicode does not define are always encoded by the reference, because each library has its
own Unicode tables, and their versions differ only in such characters.

Both encode text that spells a control token (`<|eos|>` in a document) as plain characters: the tokenizer is loaded
without its added tokens, except tokens of spaces only, which are words of some vocabularies.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.text.arrow import text_buffers
from moray.platform.core.errors import InputError
from moray.platform.store.paths import AnyPath, local_file

Choice = Literal["fast", "reference"]
Bytes = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

_RENEW_BYTES = 1_000_000_000  # gigatoken caches every word that it has encoded; recreated after this much text


@dataclass(frozen=True)
class Encoded:
    """Concatenated ids of N texts, uint32 [T]; the ids of text n are ids[bounds[n] : bounds[n + 1]]."""

    ids: npt.NDArray[np.uint32]
    bounds: Int64


class Encoder(Protocol):
    def encode(self, texts: pa.Array | pa.ChunkedArray) -> Encoded:
        """The ids of a column of strings, without special tokens."""


class ReferenceEncoder:
    """Hugging Face `tokenizers`, on this thread and others that TOKENIZERS_PARALLELISM allows."""

    def __init__(self, plain: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer: Any = Tokenizer.from_str(plain)

    def encode(self, texts: pa.Array | pa.ChunkedArray) -> Encoded:
        found = self.tokenizer.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
        bounds = np.cumsum([0, *(len(one) for one in found)], dtype=np.int64)
        ids = np.empty(bounds[-1], np.uint32)
        for one, begin, end in zip(found, bounds[:-1], bounds[1:], strict=True):
            ids[begin:end] = one.ids
        return Encoded(ids, bounds)


class FastEncoder:
    """gigatoken, on this thread, without copying Arrow's memory."""

    def __init__(self, plain: str) -> None:
        """Raises ImportError without gigatoken, ValueError for a tokenizer that it does not support."""
        self._plain = plain
        self._reference: ReferenceEncoder | None = None
        self._start()

    def _start(self) -> None:
        from gigatoken import Tokenizer

        self._library = Tokenizer.from_json(self._plain)
        self._seen = 0

    def encode(self, texts: pa.Array | pa.ChunkedArray) -> Encoded:
        offsets, data = text_buffers(texts)
        if len(offsets) == 1:
            return Encoded(np.zeros(0, np.uint32), np.zeros(1, np.int64))
        if self._seen > _RENEW_BYTES:
            self._start()
        self._seen += int(offsets[-1] - offsets[0])
        found = self._library.encode_batch(_strings(offsets, data), parallel=False).layout
        encoded = Encoded(np.asarray(found.content.data), np.asarray(found.offsets.data, np.int64))
        unknown = texts_with_unknown(offsets, data)
        if not len(unknown):
            return encoded
        if self._reference is None:
            self._reference = ReferenceEncoder(self._plain)
        return _replaced(encoded, unknown, self._reference.encode(texts.take(pa.array(unknown))))


def choose_encoder(
    setting: Literal["auto", "fast", "reference"], folder: Path, names: Sequence[str], texts: Sequence[str]
) -> tuple[Choice, str]:
    """(the encoder to use, the reason if `auto` chooses the reference, else '').

    names, texts: documents on which both encoders must agree, as on the texts of `probes`. Raises InputError if
    `setting` is "fast" and the fast encoder is unavailable.
    """
    if setting == "reference":
        return "reference", ""
    plain, own = plain_json(folder), probes(folder)
    titles = [f"probe {n} (pipelines/tokenizer/encoders.py)" for n in range(len(own))]
    try:
        reason = difference(FastEncoder(plain), ReferenceEncoder(plain), [*titles, *names], [*own, *texts])
    except ImportError:
        reason = "gigatoken is not installed"
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        reason = f"gigatoken does not support this tokenizer: {error}"
    if not reason:
        return "fast", ""
    if setting == "fast":
        raise InputError(f"tokenize.encoder: fast: {reason}", "set encoder to auto, to use Hugging Face tokenizers")
    return "reference", reason


@functools.lru_cache(maxsize=4)
def encoder(which: Choice, folder: AnyPath) -> Encoder:
    """The encoder for a tokenizer's folder, cached per process."""
    plain = plain_json(folder)
    return FastEncoder(plain) if which == "fast" else ReferenceEncoder(plain)


def plain_json(folder: AnyPath) -> str:
    """`tokenizer.json` for encoding documents: without truncation, and without control tokens that text could match."""
    with local_file(folder / "tokenizer.json") as local:
        content = json.loads(local.read_text(encoding="utf-8"))
    kept = [token for token in content.get("added_tokens") or [] if token["content"].isspace()]
    removed = {"truncation": None, "padding": None, "post_processor": None}
    return json.dumps({**content, "added_tokens": kept, **removed})


def difference(fast: FastEncoder, reference: ReferenceEncoder, names: Sequence[str], texts: Sequence[str]) -> str:
    """Description of the first difference between the two encoders, with text and position; '' if there is none."""
    column = pa.array(texts, pa.large_string())
    ours, theirs = fast.encode(column), reference.encode(column)
    for n, name in enumerate(names):
        one = ours.ids[ours.bounds[n] : ours.bounds[n + 1]]
        other = theirs.ids[theirs.bounds[n] : theirs.bounds[n + 1]]
        if np.array_equal(one, other):
            continue
        size = min(len(one), len(other))
        place = int(np.append(one[:size] != other[:size], True).argmax())
        spans = reference.tokenizer.encode(texts[n], add_special_tokens=False).offsets
        at = spans[place][0] if place < len(spans) else len(texts[n])
        found, expected = (ids[place : place + 3].tolist() for ids in (one, other))
        return (
            f"gigatoken gives different ids for {name} at character {at}, {texts[n][at : at + 20]!r}: "
            f"{found} instead of {expected}"
        )
    return ""


_KINDS = (
    "a", "Zz", "\u00e9", "e\u0301", "\u0130", "\u0416", "\u03b1", "\u0627", "\u0905\u0902", "\u4e2d\u6587", "\u3042",
    "\u30ab\u30fc", "\u30fb", "\ud55c", "\u0e01\u0e33", "1", "1234567", "\u0663", "\u00bd", "\u216b", ".", "'s", "'",
    "!?", "\u2026", "\u201c", "$", "\u20ac", "+=", "^", "\u00b4", "_", " ", "   ", "\u00a0", "\u3000", "\t", "\n",
    "\r\n", "\n\n", "\x00", "\x1c", "\u0085", "\u200b", "\u200d", "\ue000", "\ufeff", "\ufffd", "\U0001f600",
    "\U0001f469\u200d\U0001f4bb", "\U0002000b", "\U000e0041",
)  # fmt: skip


def probes(folder: Path) -> list[str]:
    """Test texts: every kind of character next to every other, long runs, and the spellings of control tokens."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    spelled = "".join(f"a{token['content']} {token['content']}\n" for token in content.get("added_tokens") or [])
    pairs = [
        "".join(f"{first}{second}{third}" for second in _KINDS for third in ("", " ", "x", "\n")) for first in _KINDS
    ]
    runs = "".join(f"{one * 70}{one * 1300} " for one in _KINDS)
    return [spelled, runs, "", *pairs]


def _strings(offsets: Int64, data: Bytes) -> Any:
    """An awkward array of strings over the same memory, which gigatoken reads without a copy."""
    from awkward import Array
    from awkward.contents import ListOffsetArray, NumpyArray
    from awkward.index import Index64

    characters = NumpyArray(data, parameters={"__array__": "char"})
    return Array(ListOffsetArray(Index64(offsets), characters, parameters={"__array__": "string"}))


@functools.cache
def _unassigned() -> npt.NDArray[np.bool_]:
    """bool [0x110000]: whether a code point is unassigned in this Python's Unicode."""
    categories = (unicodedata.category(chr(code)) == "Cn" for code in range(0x110000))
    return np.fromiter(categories, np.bool_, 0x110000)


def texts_with_unknown(offsets: Int64, data: Bytes) -> Int64:
    """Numbers of the texts that contain a character that is unassigned in this Python's Unicode, ascending."""
    begin, end, step = int(offsets[0]), int(offsets[-1]), 1 << 24
    found = [places for at in range(begin, end, step) for places in _unknown(data, at, min(end, at + step))]
    if not found:
        return np.zeros(0, np.int64)
    texts: Int64 = np.unique(np.searchsorted(offsets, np.concatenate(found), side="right") - 1)
    return texts


def _unknown(data: Bytes, start: int, stop: int) -> Iterator[Int64]:
    """Positions of unassigned characters whose first byte is in data[start:stop]; data is valid UTF-8."""
    part = data[start:stop]
    for low, high, width in ((0xC2, 0xE0, 2), (0xE0, 0xF0, 3), (0xF0, 0xF8, 4)):
        places = start + np.flatnonzero((part >= low) & (part < high))
        codes = data[places].astype(np.int32) & (0xFF >> (width + 1))
        for k in range(1, width):
            codes = codes << 6 | (data[places + k] & 0x3F)
        yield places[_unassigned()[codes]]


def _replaced(encoded: Encoded, rows: Int64, by: Encoded) -> Encoded:
    """`encoded` with the ids of the texts `rows`, ascending, replaced by those of `by`, which has only these texts."""
    counts = np.diff(encoded.bounds)
    counts[rows] = np.diff(by.bounds)
    parts, at = [], 0
    for n, row in enumerate(rows.tolist()):
        parts += [encoded.ids[at : encoded.bounds[row]], by.ids[by.bounds[n] : by.bounds[n + 1]]]
        at = int(encoded.bounds[row + 1])
    return Encoded(np.concatenate([*parts, encoded.ids[at:]]), np.concatenate([[0], np.cumsum(counts)]))
