"""Detection of secret keys in a text: access keys of well-known services, private keys, JSON web tokens, and
random-looking values assigned to names such as `api_key`.

Every pattern is bounded or possessive, so a search takes time linear in the length of the text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

Span = tuple[int, int]

# (a literal that every key of this form contains, which is searched for first; the form)
_FORMS = tuple(
    (mark, re.compile(rf"(?<![\w-]){form}(?![\w-])"))
    for mark, form in (
        ("AKIA", r"AKIA[A-Z0-9]{16}"),  # AWS
        ("ASIA", r"ASIA[A-Z0-9]{16}"),
        ("gh", r"gh[pousr]_[A-Za-z0-9]{36,255}+"),  # GitHub
        ("github_pat_", r"github_pat_\w{22,255}+"),
        ("glpat-", r"glpat-[\w-]{20,64}+"),  # GitLab
        ("xox", r"xox[abeoprs]-[A-Za-z0-9-]{10,255}+"),  # Slack
        ("AIza", r"AIza[\w-]{35}"),  # Google
        ("_live_", r"[rs]k_live_[A-Za-z0-9]{16,255}+"),  # Stripe
        ("sk-", r"sk-[\w-]{20,255}+"),  # OpenAI, Anthropic
        ("hf_", r"hf_[A-Za-z0-9]{30,64}+"),  # Hugging Face
        ("npm_", r"npm_[A-Za-z0-9]{36}"),
        ("pypi-", r"pypi-[\w-]{60,255}+"),
        ("eyJ", r"eyJ[\w-]{8,4000}+\.eyJ[\w-]{8,8000}+\.[\w-]{8,1000}+"),  # a JSON Web Token
    )
)
_BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_END = re.compile(r"-----END (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_BODY = re.compile(r"[A-Za-z0-9+/=]{32}")
_LONGEST_BLOCK = 20_000
_GIVEN = re.compile(r"[:=][=>]?[ \t]{0,4}[\"']?([A-Za-z0-9+/_.~=-]{20,200}+)")
_NAME = re.compile(r"(?:key|token|secret)[\"']?[ \t]{0,4}$", re.IGNORECASE)
_MIN_ENTROPY = 3.5  # bits per character; 20 random hex digits have 3.4 on average and 4 at most, English less
_MIN_DIGITS = 2


def find_secret_keys(text: str) -> Iterator[Span]:
    """Yields the spans of keys, unordered; they may overlap."""
    for mark, form in _FORMS:
        if mark in text:
            yield from (found.span() for found in form.finditer(text))
    yield from _blocks(text)
    for found in _GIVEN.finditer(text):
        if _NAME.search(text, max(0, found.start() - 12), found.start()) and _random(found[1]):
            yield found.span(1)


def _blocks(text: str) -> Iterator[Span]:
    """Yields the spans of private keys in PEM and PGP format, with a begin line, a body and an end line.

    The next end and the next body are searched for once and reused until the scan has passed them, so many begin lines
    before one end line cost no more than one.
    """
    ends, bodies = _Next(_END, text), _Next(_BODY, text)
    at = 0
    while (begin := _BEGIN.search(text, at)) and (end := ends.after(begin.end())):
        at = begin.end()
        body = bodies.after(at) if end[1] <= at + _LONGEST_BLOCK else None
        if body and body[1] <= end[0]:
            yield begin.start(), end[1]
            at = end[1]


class _Next:
    """Finds the first match of a pattern at or after a position; positions must be ascending."""

    def __init__(self, pattern: re.Pattern[str], text: str) -> None:
        self._pattern, self._text = pattern, text
        self._span: Span | None = (-1, -1)

    def after(self, at: int) -> Span | None:
        if self._span and self._span[0] < at:
            found = self._pattern.search(self._text, at)
            self._span = found.span() if found else None
        return self._span


def _random(value: str) -> bool:
    """Whether a value looks random: it has digits, letters and the minimum entropy."""
    if sum(map(str.isdigit, value)) < _MIN_DIGITS or not any(map(str.isalpha, value)):
        return False
    shares = [n / len(value) for n in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares) >= _MIN_ENTROPY
