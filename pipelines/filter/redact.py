"""PII redaction: replaces personal data and secrets with `<email>`, `<ip>`, `<phone>`, `<card>` and `<key>`.

Emails and keys are recognized by their form. Matches that could be other numbers are checked: IP addresses must be
public and not a version number, cards must pass the Luhn check and begin with the prefix of an issuer, and phone
numbers must be valid by Google's libphonenumber. The length of each match is bounded, so the time is linear in the
length of the text.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from moray.pipelines.filter.keys import Span, find_secret_keys

Kind = Literal["email", "ip", "phone", "card", "key"]
KINDS: tuple[Kind, ...] = ("key", "email", "ip", "card", "phone")  # in the order of redaction

# Each pattern begins with a required character, which makes the scan fast, and looks behind from there. Of IPv6, only
# 2000::/3 (global unicast) is matched: `a::b`, which is common in code, would be an address too.
_LOCAL = re.compile(r"[\w.%+-]")
_DOMAIN = re.compile(r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,6}([^\W\d_]{2,24})(?![\w-])")
_FILES = frozenset(  # extensions of file names, which are not domains
    ("png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "css", "js", "json", "html", "htm", "php", "xml")
)
_V4 = re.compile(r"\d(?<![\w.].)\d{0,2}(?:\.\d{1,3}){3}(?![\w+]|[.-]\w)")
_SHORTEST = len("1.2.3.4")  # four single digits: sections and versions, and one address in 400,000
_VERSION = re.compile(
    r"(?:\bv|\bver|version|release|build|revision|firmware|section|\brev)[\"']?\W{0,4}$|[=<>~^!]=?\s?[\"']?$|\w[/@_-]$",
    re.IGNORECASE,
)
_ADDRESS = re.compile(
    r"(?:\bip|addr|address|host|server|remote|dns)\w{0,8}[\"']?\s?[=:]{1,2}\s?[\"']?$|//$|\bip $", re.IGNORECASE
)
_V6 = re.compile(r"[23](?<![\w:.].)[0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,8}(?![\w:])")
_CARD = re.compile(
    r"\d(?<![\w.+-].)(?:\d{12,18}|\d{3}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|\d{3}([ -])\d{6}\2\d{4,5})"
    r"(?![\w-]|[.,]\d)"
)
_ISSUERS = re.compile(r"4|5[1-5]|2(?:2[2-9]|[3-6]|7[01])|3[47]|3[068]|35|6011|64[4-9]|65|62|50|5[6-8]|6[37]")
_INTERNATIONAL = re.compile(r"\+(?<![\w+].)\d[\d ()./-]{5,22}\d(?!\w)")
_LONGEST_NATIONAL = 13  # digits
_NATIONAL = re.compile(r"[(\d](?<![\w.+/-].)[\d ()./-]{5,21}\d(?![\w/-]|[.,]\d)")


def redact(text: str, kinds: Iterable[Kind], regions: tuple[str, ...] = ()) -> tuple[str, Counter[str]]:
    """The text with a marker in place of each match of `kinds`, and the number of matches of each kind.

    regions: two-letter countries whose phone numbers are also found without a country code.
    """
    selected, counts = set(kinds), Counter[str]()
    finders: dict[Kind, Callable[[str], Iterable[Span]]] = {
        "key": find_secret_keys, "email": _emails, "ip": _addresses, "card": _cards,
        "phone": lambda t: _phones(t, regions),
    }  # fmt: skip
    for kind in KINDS:
        if kind in selected:
            text, counts[kind] = _replaced(text, finders[kind](text), f"<{kind}>")
    return text, counts


def _replaced(text: str, spans: Iterable[Span], marker: str) -> tuple[str, int]:
    """The text with a marker in place of each span, one for overlapping spans, and the number of markers."""
    parts: list[str] = []
    at = count = 0
    for begin, end in sorted(spans):
        if begin >= at:
            parts += [text[at:begin], marker]
            count += 1
        at = max(at, end)
    return "".join([*parts, text[at:]]), count


def _emails(text: str) -> Iterator[Span]:
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        begin = at
        while domain and begin > 0 and at - begin < 64 and _LOCAL.match(text[begin - 1]):
            begin -= 1
        if domain and begin < at and domain[1].lower() not in _FILES and text[begin:at] != "git":
            yield begin, domain.end()
        at = text.find("@", at + 1)


def _addresses(text: str) -> Iterator[Span]:
    for found in _V4.finditer(text):
        before = text[max(0, found.start() - 24) : found.start()]
        plausible = len(found[0]) > _SHORTEST and not _VERSION.search(before)
        if (plausible or _ADDRESS.search(before)) and _public(found[0]):
            yield found.span()
    for found in _V6.finditer(text):
        whole = found[0]
        address = whole[:-1] if whole.endswith(":") and not whole.endswith("::") else whole
        if _public(address) and not address.endswith("::"):  # a network
            yield found.start(), found.start() + len(address)


def _public(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


def _cards(text: str) -> Iterator[Span]:
    for found in _CARD.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        if _ISSUERS.match(digits) and _luhn(digits):
            yield found.span()


def _luhn(digits: str) -> bool:
    """The Luhn check (ISO/IEC 7812-1): with every other digit doubled, the sum of all digits is a multiple of ten."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(map(int, digits[::-2]))) % 10 == 0 and len(set(digits)) > 1


def _phones(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    for found in _INTERNATIONAL.finditer(text):
        yield from _numbers(found, None)
    for region in regions:
        for found in _NATIONAL.finditer(text):
            if not found[0].isdigit() and sum(map(str.isdigit, found[0])) <= _LONGEST_NATIONAL:
                yield from _numbers(found, region)


def _numbers(found: re.Match[str], region: str | None) -> Iterator[Span]:
    """Yields the spans of valid phone numbers in a match.

    Without a country code, digits must be grouped as is usual in the region, because other groups of digits are often
    dates.
    """
    from phonenumbers import Leniency, PhoneNumberMatcher

    leniency = Leniency.VALID if region is None else Leniency.STRICT_GROUPING
    for number in PhoneNumberMatcher(found[0], region, leniency):
        yield found.start() + number.start, found.start() + number.end
