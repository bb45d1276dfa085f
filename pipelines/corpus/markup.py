"""What makes a page take more than linear time to read, seen from its markup alone, in one pass over it.

Deterministic where a limit of time cannot be: the same page is left out on every machine. It knows what crawls hold
most of (blocks in one another, elements of style that nobody ends); what else there is meets the limits of
`extractor_process.py`.
"""

from __future__ import annotations

import re

DEPTH = 1000  # elements in one another; finding the main text takes the square of it, browsers stop at 512
REOPENED = 250_000  # elements that a parser makes because others were not ended
_FEW = 1000  # tags that can do no harm
_BLOCK = "div|section|article|main|aside|nav|form|blockquote|center|table|ul|ol|dl"
_STYLE = "a|b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u"  # "formatting" in the HTML standard, 13.2.4.3
_BLOCKS = re.compile(rf"<(/?)(?:{_BLOCK})\b", re.I)
_ALL = re.compile(
    rf"<(/?)(?:(?:{_BLOCK}|p|li|td|th|tr|dt|dd|pre|h[1-6]|fieldset|header|footer|figure)|({_STYLE}))\b", re.I
)


def too_much(html: str) -> str:
    """Why a page is not read; '' for one that is."""
    tags = html.count("<")
    if tags <= _FEW:
        return ""
    if _depth(html) > DEPTH:
        return f"elements in one another more than {DEPTH} deep"
    if tags - 2 * html.count("</") > _FEW and _reopened(html) > REOPENED:
        return f"elements of style that are not ended, and would be opened again more than {REOPENED} times"
    return ""


def _depth(html: str) -> int:
    """How deep blocks lie in one another, by their tags. One that ends what was not begun ends nothing."""
    depth = deepest = 0
    for tag in _BLOCKS.finditer(html):
        if not tag.group(1):
            depth += 1
            deepest = max(deepest, depth)
        elif depth:
            depth -= 1
    return deepest


def _reopened(html: str) -> int:
    """How many elements of style a parser would make anew: in each block all that were begun and not ended before."""
    still_open = made = 0
    for tag in _ALL.finditer(html):
        ends, style = tag.groups()
        if not style:
            made += 0 if ends else still_open
        elif not ends:
            still_open += 1
        elif still_open:
            still_open -= 1
    return made
