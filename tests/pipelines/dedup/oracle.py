"""dedup by its definition: every pair of documents, sets of Python strings, no hash and no sketch."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

from moray.pipelines.shared.documents import content_hash

# Every letter is a word: ideographs, kana, Korean syllables; Thai, Lao, Burmese, Khmer, Javanese.
ALONE = re.compile(
    "[\u1100-\u115f\u2e80-\u2fdf\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\ua980-\ua9df\U00020000-\U0003ffff]"
)
_UNSEEN = set("\u00ad\u034f\u0640\u200b\u200c\u200d\u200e\u200f\u2060\ufe0f\ufeff\U000e0101")


@dataclass(frozen=True)
class Text:
    id: str
    text: str
    source: str = "s"


@cache
def normalized(character: str) -> str:
    """NFKD with full case folding, without accents and without what is not seen."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold()).replace("\u0131", "i")
    return "".join(one for one in folded if not unicodedata.combining(one) and one not in _UNSEEN)


def fold(text: str) -> str:
    """What would become more characters than it has bytes stays."""
    folded = [(one, normalized(one)) for one in text]
    return "".join(one.lower() if len(its) > len(one.encode()) else its for one, its in folded)


def graphemes(text: str) -> Iterator[str]:
    """Folded letters with their marks, and what is no part of a word as it is."""
    found = ""
    for character in fold(text):
        mark = unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"
        if found and not (mark and _in_word(found[-1])):
            yield found
            found = ""
        found += character
    if found:
        yield found


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"


def words(text: str) -> Iterator[str]:
    word = ""
    for one in graphemes(text):
        alone = bool(ALONE.match(one)) and unicodedata.category(one[0]) not in ("Nd", "Mn", "Mc")
        if not alone and _in_word(one[0]):
            word += one
            continue
        if word:
            yield word
        word = ""
        if alone and (_in_word(one[0]) or ord(one[0]) >= 0x20000):
            yield one
    if word:
        yield word


def characters(text: str) -> list[str]:
    found: list[str] = []
    for one in graphemes(text):
        inside = _in_word(one[0]) or 0x20000 <= ord(one[0]) < 0x40000
        if inside or (found and found[-1] != " "):
            found.append(one if inside else " ")
    return found[:-1] if found[-1:] == [" "] else found


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
