"""decontaminate by its definition: sets of tuples of Python strings, no hash and no index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.pipelines.dedup.oracle import ALONE, characters, words

Gram = tuple[str, ...]


def units(text: str, unit: str) -> list[str]:
    return list(words(text)) if unit == "words" else characters(text)


def windows(found: Sequence[str], size: int) -> set[Gram]:
    return {tuple(found[i : i + size]) for i in range(len(found) - size + 1)}


def telling(name: str, unit: str) -> bool:
    ideograph = bool(ALONE.match(name))
    return sum(map(str.isalpha, name)) > (unit == "words" and not ideograph)


def grams(texts: Sequence[str], unit: str, size: int, least: int, tells: int) -> set[Gram]:
    """The n-grams of an item by the texts in it."""
    read = [units(text, unit) for text in texts]
    found = set().union(*(windows(one, size) for one in read))
    if all(len(one) < size for one in read):
        found = {tuple(one) for one in read if len(one) >= least}
    return {gram for gram in found if len({u for u in gram if telling(u, unit)}) >= tells}


def hits(
    documents: Mapping[str, str],
    items: Mapping[str, Sequence[str]],
    unit: str,
    size: int,
    least: int,
    tells: int,
    ignore_common: int | None = None,
) -> dict[tuple[str, str], tuple[int, float]]:
    """(document, item) -> n-grams in common, and their share of the item's."""
    wanted = {item: grams(texts, unit, size, least, tells) for item, texts in items.items()}
    sizes = {len(gram) for its in wanted.values() for gram in its}
    held = {name: set().union(*(windows(units(text, unit), one) for one in sizes)) for name, text in documents.items()}
    if ignore_common is not None:
        for gram in set().union(*wanted.values()):
            if sum(gram in its for its in held.values()) > ignore_common:
                for its in wanted.values():
                    its.discard(gram)
    return {
        (name, item): (len(its & have), len(its & have) / len(its))
        for name, have in held.items()
        for item, its in wanted.items()
        if its & have
    }
