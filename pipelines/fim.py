"""Fill in the middle: documents whose middle comes last, so that a model learns to write what lies between two texts.

DeepSeek-V3 (4.1): a tenth of the documents, as prefix, suffix, middle. Where a document is cut, and whether, follows
from its id, so that neither the layout of the corpus nor the number of workers has a say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from moray.pipelines.tokenizer import FIM
from moray.platform.errors import InputError

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


def cut(name: str, text: str, rate: float) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix) of the document with this id, or None if it stays as it is."""

    def chance(what: str) -> float:
        return xxhash.xxh3_64_intdigest(f"fim/{what}/{name}".encode()) / 2**64

    if chance("chosen") >= rate:
        return None
    first, second = sorted(int(chance(what) * (len(text) + 1)) for what in ("first", "second"))
    return text[:first], text[first:second], text[second:]


def encode_middles_last(
    tokenizer: Any, marks: Marks, names: Sequence[str], texts: Sequence[str], rate: float
) -> list[list[int]]:
    """The ids of each text; of a document that is chosen: begin, prefix, hole, suffix, end, middle."""
    parts = [cut(name, text, rate) or (text,) for name, text in zip(names, texts, strict=True)]
    pieces = tokenizer.encode_batch([piece for part in parts for piece in part], add_special_tokens=False)
    ids = iter([encoding.ids for encoding in pieces])
    found = []
    for part in parts:
        if len(part) == 1:
            found.append(next(ids))
        else:
            prefix, middle, suffix = next(ids), next(ids), next(ids)
            found.append([marks.begin, *prefix, marks.hole, *suffix, marks.end, *middle])
    return found
