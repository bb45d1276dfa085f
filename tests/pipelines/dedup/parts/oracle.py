"""dedup-parts by its definition: strings of Python, every window, no hash, no range, no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from moray.pipelines.shared.documents import content_hash
from tests.pipelines.dedup.oracle import fold, words
from tests.pipelines.step_runs import Page

Piece = tuple[str, ...]


@dataclass
class Outcome:
    """standing: whole pieces of what is kept; cut: of each edited document its characters that go; gone: id -> why."""

    standing: Counter[Piece] = field(default_factory=Counter)
    cut: dict[str, set[int]] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)


@cache
def placed_words(text: str) -> list[tuple[str, int, int]]:
    """(word, begin, end): by adding a character at a time."""
    found: list[tuple[str, int, int]] = []
    for i, character in enumerate(text):
        here = list(words(character))
        touches = bool(found) and found[-1][2] == i
        if not here:
            if touches and not fold(character):  # an accent of the last letter
                found[-1] = (*found[-1][:2], i + 1)
            continue
        if touches and len(list(words(text[found[-1][1] : i + 1]))) == 1:
            found[-1] = (found[-1][0] + here[0], found[-1][1], i + 1)
        else:
            found.append((here[0], i, i + 1))
    return found


def windows(text: str, tokens: int) -> list[tuple[Piece, int, int]]:
    placed = placed_words(text)
    return [
        (tuple(word for word, _, _ in placed[i : i + tokens]), placed[i][1], placed[i + tokens - 1][2])
        for i in range(len(placed) - tokens + 1)
    ]


def parts(text: str, unit: str, least: int) -> list[tuple[Piece, int, int]]:
    found = []
    for begin, end in _bounds(text, unit):
        plain = " ".join(text[begin:end].casefold().split())
        if len(plain) >= least:
            found.append(((plain,), begin, end))
    return found


def _bounds(text: str, unit: str) -> Iterator[tuple[int, int]]:
    """Lines; or runs of lines up to the blank ones after them, which belong to the paragraph before."""
    lines = text.split("\n")
    lines = [line + "\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])
    at, begin = 0, 0
    for i, line in enumerate(lines):
        at += len(line)
        following = lines[i + 1] if i + 1 < len(lines) else None
        blank = not line.strip() and line.endswith("\n") and i > 0
        closes = blank and not (following is not None and not following.strip() and following.endswith("\n"))
        if unit == "line" or following is None or closes:
            yield begin, at
            begin = at


def priority_order(pages: Sequence[Page], prefer: Sequence[str]) -> list[Page]:
    rank = {source: i for i, source in enumerate(prefer)}
    return sorted(pages, key=lambda p: (rank.get(p.source, len(rank)), -len(p.text), content_hash(p.text), p.id))


def outcome(
    pages: Sequence[Page], unit: str, size: int, copies: int, max_loss: float, min_words: int, prefer: Sequence[str]
) -> Outcome:
    """size: words of a window, or characters of a part at least."""
    found = Outcome()
    for page in priority_order(pages, prefer):
        pieces = windows(page.text, size) if unit == "substring" else parts(page.text, unit, size)
        cut: set[int] = set()
        stood: list[Piece] = []
        waiting = list(pieces)
        for name, begin, end in [*pieces, (("",), len(page.text) + 1, 0)]:
            while waiting and waiting[0][2] <= begin:
                passed = waiting.pop(0)
                if not cut & set(range(passed[1], passed[2])):
                    stood.append(passed[0])
                    found.standing[passed[0]] += 1
            if end and found.standing[name] >= copies:
                cut |= set(range(begin, end))
        if not cut:
            continue
        left = sum(begin not in cut for _, begin, _ in placed_words(page.text))
        reason = "nothing_left" if not left else ""
        reason = reason or ("too_much_lost" if len(cut) > max_loss * len(page.text) else "")
        reason = reason or ("too_little_left" if left < min_words else "")
        if reason:
            found.gone[page.id] = reason
            found.standing.subtract(stood)
        else:
            found.cut[page.id] = cut
    return found
