"""dedup by its definition: every pair of documents, sets of Python strings, no hash and no sketch."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from moray.pipelines.documents import content_hash

_CJK = re.compile(
    "[\u2e80-\u2fdf\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Text:
    id: str
    text: str
    source: str = "s"


def lower_of(character: str) -> str:
    lower = character.lower()[0]
    return character if lower.isascii() and not character.isascii() else lower


def words(text: str) -> Iterator[str]:
    word = ""
    for character in text:
        alone = bool(_CJK.match(character)) and (character.isalnum() or ord(character) >= 0x20000)
        if not alone and (character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"):
            word += lower_of(character)
            continue
        if word:
            yield word
        word = ""
        if alone:
            yield character
    if word:
        yield word


def characters(text: str) -> list[str]:
    found: list[str] = []
    for number, word in enumerate(_runs(text)):
        found += [" "] * (number > 0) + list(word)
    return found


def _runs(text: str) -> Iterator[str]:
    """Runs of characters of words, of either kind."""
    run = ""
    for character in text:
        if any(True for _ in words(character)):
            run += "".join(words(character))
        elif run:
            yield run
            run = ""
    if run:
        yield run


def shingles(text: str, size: int, unit: str = "words") -> set[tuple[str, ...]]:
    found = list(words(text)) if unit == "words" else characters(text)
    return {tuple(found[i : i + size]) for i in range(max(1, len(found) - size + 1))} if found else set()


def jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other) if one or other else 0.0


def removed(documents: Sequence[Text], least: float, size: int = 5, prefer: Sequence[str] = ()) -> dict[str, str]:
    """The id of each document that goes -> the id of the one that stays for it."""
    sets = {one.id: shingles(one.text, size) for one in documents}
    near: dict[str, set[str]] = defaultdict(set)
    for one, other in combinations(documents, 2):
        if one.text == other.text or jaccard(sets[one.id], sets[other.id]) >= least:
            near[one.id].add(other.id)
            near[other.id].add(one.id)
    rank = {source: i for i, source in enumerate(prefer)}
    order = sorted(
        documents,
        key=lambda d: (rank.get(d.source, len(rank)), -len(d.text), content_hash(d.text), d.id),
    )
    gone: dict[str, str] = {}
    seen: set[str] = set()
    for document in order:
        if document.id in seen:
            continue
        component, waiting = {document.id}, [document.id]
        while waiting:
            for other in near[waiting.pop()] - component:
                component.add(other)
                waiting.append(other)
        seen |= component
        gone |= {other: document.id for other in component - {document.id}}
    return gone
