"""Personal data and secrets in a text become `<email>`, `<ip>`, `<phone>`, `<card>` and `<key>`.

What has a form that says enough is found by it (an email's, a key's); of what looks like other numbers, each find is
checked: addresses must be public and no version's number, cards pass Luhn's check and begin as an issuer's, phone
numbers are valid by Google's libphonenumber. What a pattern may look at from any place is bounded, so a text takes time
in proportion to its length.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from moray.pipelines.filter.keys import Span, find_secret_keys

Kind = Literal["email", "ip", "phone", "card", "key"]
KINDS: tuple[Kind, ...] = ("key", "email", "ip", "card", "phone")  # in the order they are looked for

# Each begins with what it cannot do without, for which the text is skimmed, and looks back from there. Of IPv6 only
# 2000::/3 is anybody's: `a::b`, which code is full of, is an address too.
_LOCAL = re.compile(r"[\w.%+-]")
_DOMAIN = re.compile(r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,6}([^\W\d_]{2,24})(?![\w-])")
_FILES = frozenset(  # names of files are no domains
    ("png", "jpg", "jpeg", "gif", "svg", "webp", "ico", "css", "js", "json", "html", "htm", "php", "xml")
)
_V4 = re.compile(r"\d(?<![\w.].)\d{0,2}(?:\.\d{1,3}){3}(?![\w+]|[.-]\w)")
_SHORTEST = len("1.2.3.4")  # of four digits alone: sections and versions, but one address in 400,000
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
    """The text with markers for what it gives away, and how many there are of each kind.

    regions: two-letter countries whose phone numbers are looked for without their country's number too.
    """
    wanted, counts = set(kinds), Counter[str]()
    finders: dict[Kind, Callable[[str], Iterable[Span]]] = {
        "key": find_secret_keys, "email": _emails, "ip": _addresses, "card": _cards,
        "phone": lambda t: _phones(t, regions),
    }  # fmt: skip
    for kind in KINDS:
        if kind in wanted:
            text, counts[kind] = _replaced(text, finders[kind](text), f"<{kind}>")
    return text, counts


def _replaced(text: str, spans: Iterable[Span], marker: str) -> tuple[str, int]:
    """The text with a marker in the place of each span, one for those that overlap, and how many."""
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
        looks_so = len(found[0]) > _SHORTEST and not _VERSION.search(before)
        if (looks_so or _ADDRESS.search(before)) and _public(found[0]):
            yield found.span()
    for found in _V6.finditer(text):
        whole = found[0]
        address = whole[:-1] if whole.endswith(":") and not whole.endswith("::") else whole
        if _public(address) and not address.endswith("::"):  # a network's
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
    """Luhn's check (ISO/IEC 7812-1): every other digit doubled, the sum of all digits is a multiple of ten."""
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
    """Valid numbers in what was found. Without the country's number they must be grouped as they are there: digits in
    rows are anything, dates above all."""
    from phonenumbers import Leniency, PhoneNumberMatcher

    leniency = Leniency.VALID if region is None else Leniency.STRICT_GROUPING
    for number in PhoneNumberMatcher(found[0], region, leniency):
        yield found.start() + number.start, found.start() + number.end
