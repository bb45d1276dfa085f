"""Which domain a text belongs to, by words that are at home there: rough, and open to every reader (lexicon.toml).

A text's domain is that of most of its words, if these are enough; else it is General. The lexicon is English, so texts
in other languages are not judged, but software, whose words are the same everywhere.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

GENERAL, NOT_ENGLISH = "General", "Not English"
SOFTWARE = "Software"
CHARACTERS = 10_000  # of a text that are read
_LEAST_RATE = 0.02  # of words; a lexicon of 100 words has a rate near 0.002 in texts of other domains
_LEAST_DISTINCT = 3
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
LEXICON = Path(__file__).with_name("lexicon.toml")


@cache
def lexicon() -> dict[str, str]:
    """Word -> domain."""
    return {word: domain for domain, words in tomllib.loads(LEXICON.read_text()).items() for word in words.split()}


@cache
def domains() -> tuple[str, ...]:
    """All that a text can be found to belong to, as the lexicon orders them."""
    return tuple(tomllib.loads(LEXICON.read_text()))


def domain_of(text: str, language: str) -> str:
    """The domain of a text in a language ("en"; "" is unknown, and judged)."""
    words = _WORD.findall(text[:CHARACTERS].lower())
    known, hits, distinct = lexicon(), Counter[str](), Counter[str]()
    for word, count in Counter(words).items():
        if (domain := known.get(word)) is not None:
            hits[domain] += count
            distinct[domain] += 1
    english = language in ("en", "")
    enough = {
        domain: count
        for domain, count in hits.items()
        if count >= _LEAST_RATE * len(words) and distinct[domain] >= _LEAST_DISTINCT and (english or domain == SOFTWARE)
    }
    if not enough:
        return GENERAL if english else NOT_ENGLISH
    order = {domain: i for i, domain in enumerate(domains())}
    return min(enough, key=lambda domain: (-enough[domain], order[domain]))
