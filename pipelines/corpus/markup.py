"""Detects pages that take more than linear time to parse, in one pass over their markup.

The check is deterministic, which a time limit cannot be: the same page is rejected on every machine. It covers the
most common cases in crawls (deeply nested blocks, unclosed formatting elements). Other cases run into the limits of
`extractor_process.py`.
"""

from __future__ import annotations

import re

DEPTH = 1000  # nested elements; extraction time is quadratic in it, and browsers stop at 512
REOPENED = 250_000  # elements that a parser creates because earlier ones were not closed
_FEW = 1000  # tags that cannot take long
_BLOCK = "div|section|article|main|aside|nav|form|blockquote|center|table|ul|ol|dl"
_STYLE = "a|b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u"  # "formatting" in the HTML standard, 13.2.4.3
_BLOCKS = re.compile(rf"<(/?)(?:{_BLOCK})\b", re.I)
_ALL = re.compile(
    rf"<(/?)(?:(?:{_BLOCK}|p|li|td|th|tr|dt|dd|pre|h[1-6]|fieldset|header|footer|figure)|({_STYLE}))\b", re.I
)


def complexity_problem(html: str) -> str:
    """The reason why a page would take too long to parse; '' if it would not."""
    tags = html.count("<")
    if tags <= _FEW:
        return ""
    if _depth(html) > DEPTH:
        return f"elements nested more than {DEPTH} deep"
    if tags - 2 * html.count("</") > _FEW and _reopened(html) > REOPENED:
        return f"unclosed formatting elements would be reopened more than {REOPENED} times"
    return ""


def _depth(html: str) -> int:
    """Nesting depth of the blocks, by their tags. An end tag without a start tag has no effect."""
    depth = deepest = 0
    for tag in _BLOCKS.finditer(html):
        if not tag.group(1):
            depth += 1
            deepest = max(deepest, depth)
        elif depth:
            depth -= 1
    return deepest


def _reopened(html: str) -> int:
    """Number of formatting elements that a parser would reopen: in each block, all that are still open."""
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
