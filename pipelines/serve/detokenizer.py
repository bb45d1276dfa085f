"""Decoding of ids to text: the bytes of each id, and a stream that releases text only when it is final.

Notable: in a byte-level BPE every id stands for a fixed sequence of bytes, so an answer is decoded by joining bytes,
with one incremental UTF-8 decoder per answer. Nothing is decoded twice, and a code point that is split over ids stays
in the decoder until it is complete. Text that may be the start of a stop string is held back with its tokens.
"""

from __future__ import annotations

import codecs
import json
import math
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moray.pipelines.serve.name_pattern import NamePattern
from moray.pipelines.tokenizer.bos import adds_bos_token, processor_bos, read_object_or_empty
from moray.pipelines.tokenizer.train import id_count, load_tokenizer


@dataclass(frozen=True)
class Token:
    """An id with its text offset and, if requested, its log probability and the best alternatives.

    logprob: None also for the first id, which has no predecessor. offset: of its text, in characters of the answer.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Released:
    """Text that is final, and its tokens."""

    text: str = ""
    tokens: tuple[Token, ...] = ()

    def __add__(self, later: Released) -> Released:
        return Released(self.text + later.text, self.tokens + later.tokens)


class ServingVocabulary:
    """A byte-level tokenizer for serving. Raises ValueError for any other kind of tokenizer.

    bos, eos: the model's ids, None if it has none. ends: ids that end an answer, by default eos. adds_bos: whether a
    text gets a bos; None if the tokenizer's files do not set it. A bos in the post-processor takes precedence. shrinks:
    the factor by which normalization can shorten a text. Special tokens have no text.
    """

    def __init__(
        self,
        tokenizer: Any,
        bos: int | None,
        eos: int | None,
        ends: Collection[int] | None = None,
        adds_bos: bool | None = True,
    ) -> None:
        kind = type(tokenizer.decoder).__name__
        if kind != "ByteLevel":
            raise ValueError(f"the tokenizer's decoder is {kind}: only byte-level tokenizers can be served")
        # As in training: text that spells a special token is plain characters.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        first = processor_bos(tokenizer, bos)
        self.bos = bos if first is None else first
        self.adds_bos = adds_bos if first is None else True
        self.eos = eos
        self.ends = frozenset(([] if eos is None else [eos]) if ends is None else ends)
        self.shrinks = _most_shrinking(tokenizer.normalizer)
        self._added = tokenizer.get_added_tokens_decoder()
        table = _bytes_of_characters()
        self.pieces = [self._piece(index, table) for index in range(id_count(tokenizer))]
        self._labels = self._unique_labels()

    @classmethod
    def load(cls, folder: Path, bos: int | None, eos: int | None) -> ServingVocabulary:
        """Reads `tokenizer.json` of a model folder, and the end ids of `generation_config.json` if it has any."""
        ends = _ends(folder / "generation_config.json")
        tokenizer = load_tokenizer(folder)
        if "bos_token_id" not in read_object_or_empty(folder / "config.json"):  # then `bos` is only a default
            first = processor_bos(tokenizer, None)
            bos = bos if first is None else first
        return cls(tokenizer, bos, eos, ends, adds_bos_token(folder))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos unless the text starts with the name of bos, as evaluation harnesses write it.

        Names of other control tokens are plain characters. Raises ValueError for text with lone surrogates, which UTF-8
        cannot encode.
        """
        _checked(text)
        if self._names_bos(text):
            assert self.bos is not None
            return [self.bos, *self._plain(text[len(self.label(self.bos)) :])]
        return self._plain(text)

    def _names_bos(self, text: str) -> bool:
        """Whether a text starts with the name of bos, and bos is a control token and not a word."""
        added = self._added.get(self.bos)
        return added is not None and bool(added.special) and text.startswith(str(added.content))

    def _plain(self, text: str) -> list[int]:
        # As a batch, because `encode` holds the GIL until it returns.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Ids of control tokens by name: those of the tokenizer that have no text."""
        return {str(added.content): index for index, added in self._added.items() if added.special and added.content}

    @cached_property
    def control_names(self) -> NamePattern:
        return NamePattern(self.control_tokens)

    def encode_rendered(self, text: str, mark: str) -> list[int]:
        """Ids of a rendered chat template: names of control tokens are their ids, and `mark` is nothing. So a name with
        a mark inside is plain characters. Raises ValueError for text with lone surrogates."""
        ids: list[int] = []
        for piece, is_name in self.control_names.pieces(text):
            if is_name:
                ids.append(self.control_tokens[piece])
            elif piece := piece.replace(mark, ""):
                ids += self._plain(_checked(piece))
        return ids

    @property
    def longest_piece(self) -> int:
        """Length of the longest piece in bytes, at least 1."""
        return max(1, max(map(len, self.pieces), default=1))

    def piece(self, index: int) -> bytes:
        """The bytes of an id; empty for special tokens and for ids outside the tokenizer."""
        return self.pieces[index] if index < len(self.pieces) else b""

    def label(self, index: int) -> str:
        """The name of an id in logprobs: its text, `bytes:\\x..` if that is not valid UTF-8, or a special token's name.

        Names are unique: of several ids with the same text, the lowest has it, and the others are `token_id:N`, as are
        ids without a token.
        """
        return self._labels[index] if index < len(self._labels) else f"token_id:{index}"

    def _unique_labels(self) -> list[str]:
        seen: set[str] = set()
        labels = []
        for index in range(len(self.pieces)):
            text = self._text(index)
            labels.append(f"token_id:{index}" if not text or text in seen else text)
            seen.add(text)
        return labels

    def _text(self, index: int) -> str:
        added = self._added.get(index)
        if added is not None:
            return str(added.content)
        try:
            return self.piece(index).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.piece(index))

    def _piece(self, index: int, table: dict[str, int]) -> bytes:
        added = self._added.get(index)
        if added is not None:
            return b"" if added.special else str(added.content).encode()
        spelling = self._tokenizer.id_to_token(index) or ""
        if any(character not in table for character in spelling):
            return str(spelling).encode()
        return bytes(table[character] for character in spelling)


def _checked(text: str) -> str:
    """`text`, if UTF-8 can encode it. Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text contains a lone surrogate, which is not a character") from None
    return text


def _most_shrinking(normalizer: Any) -> float:
    """Upper bound of the factor by which a normalizer shortens a text in UTF-8 bytes; infinite if unknown.

    Unicode composition joins a letter with its marks: at most three characters become one, of at least as many bytes as
    one of them.
    """
    if normalizer is None:
        return 1.0
    content = json.loads(normalizer.__getstate__())
    parts = content.get("normalizers", [content])
    kinds = {part.get("type") for part in parts}
    return 1.0 if not kinds else 4.0 if kinds <= {"NFC", "NFD", "NFKC", "NFKD", "Prepend"} else math.inf


def _ends(path: Path) -> list[int] | None:
    """`eos_token_id` of a generation_config.json, one id or several, which in transformers overrides config.json; None
    if it is not set. Raises ValueError for an invalid value."""
    ends = read_object_or_empty(path).get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise ValueError(f"{path}: eos_token_id = {ends!r} must be an id, or a list of ids")
    return None if ends is None else ids


def _bytes_of_characters() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary.

    GPT-2's table: printable Latin-1 characters stand for their own byte, the characters from U+0100 for the other 68.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


class TextStream:
    """The text of one answer, released piece by piece. stopped: whether a stop string was found. shown: ids of control
    tokens whose names are part of the text."""

    def __init__(
        self, vocabulary: ServingVocabulary, stop: tuple[str, ...] = (), shown: Collection[int] = frozenset()
    ) -> None:
        self._vocabulary = vocabulary
        self._stop = stop
        self._shown = shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._released = 0
        self._waiting: deque[Token] = deque()
        self.stopped = False

    def echo(self, tokens: Iterable[Token]) -> Released:
        """Adds the prompt, which is released in full; stop strings in it are ignored."""
        pieces, offset = [self._held], self._released + len(self._held)
        for token in tokens:
            self._waiting.append(Token(token.id, token.logprob, token.top, offset))
            pieces.append(self._decoder.decode(self._vocabulary.piece(token.id)))
            offset += len(pieces[-1])
        self._held = "".join(pieces)
        return self._release(len(self._held))

    def push(self, token: Token) -> Released:
        """Adds one generated token. Releases text up to a stop string."""
        self._append(token)
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if not found:
            return self._release(len(self._held) - self._possible_stop())
        self.stopped = True
        return self._release(min(found))

    def finish(self) -> Released:
        """Releases all remaining text. Bytes of an incomplete code point become U+FFFD."""
        self._held += self._decoder.decode(b"", final=True)
        last = self._release(len(self._held))
        return last + Released(tokens=tuple(self._waiting))

    def _append(self, token: Token) -> None:
        self._waiting.append(Token(token.id, token.logprob, token.top, self._released + len(self._held)))
        shown = token.id in self._shown
        self._held += self._decoder.decode(
            self._vocabulary.label(token.id).encode() if shown else self._vocabulary.piece(token.id)
        )

    def _possible_stop(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _release(self, length: int) -> Released:
        text, self._held = self._held[:length], self._held[length:]
        self._released += length
        tokens = []
        while self._waiting and self._waiting[0].offset < self._released:
            tokens.append(self._waiting.popleft())
        return Released(text, tuple(tokens))
