"""Assignment of texts to domains by a lexicon of typical words (lexicon.toml): approximate, but easy to inspect.

A text belongs to the domain with most of its words if there are enough of them, else to General. The lexicon is
English. Texts in other languages are only assigned to Software, whose words are the same in all languages.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

GENERAL, NOT_ENGLISH = "General", "Not English"
SOFTWARE = "Software"
CHARACTERS = 10_000  # read per text
_MIN_SHARE = 0.02  # of the words; a lexicon of 100 words has a share of about 0.002 in texts of other domains
_MIN_DISTINCT = 3
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
LEXICON = Path(__file__).with_name("lexicon.toml")


@cache
def lexicon() -> dict[str, str]:
    """Word -> domain."""
    return {word: domain for domain, words in tomllib.loads(LEXICON.read_text()).items() for word in words.split()}


@cache
def domains() -> tuple[str, ...]:
    """All domains, in the order of the lexicon."""
    return tuple(tomllib.loads(LEXICON.read_text()))


def domain_of(text: str, language: str) -> str:
    """The domain of a text. language: such as "en"; "" is unknown and treated as English."""
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
        if count >= _MIN_SHARE * len(words) and distinct[domain] >= _MIN_DISTINCT and (english or domain == SOFTWARE)
    }
    if not enough:
        return GENERAL if english else NOT_ENGLISH
    order = {domain: i for i, domain in enumerate(domains())}
    return min(enough, key=lambda domain: (-enough[domain], order[domain]))
