"""The n-grams of evals by hash, with the items that have each; and the search of texts for them, exact in the end.

An item's n-grams are those of its texts (fields). One all of whose texts are shorter than an n-gram is looked for by
these texts as wholes, where they have the least length; an item with none of that is too short to be looked for. Nor
are n-grams looked for that say nothing, such as 1 2 3 ... 13 or 8 9 a b c d: those with few distinct words that are
more than a number or a letter.

Shapes: G distinct n-grams, M places where they stand in pieces, I items, P pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.decontaminate.evals import EvalText
from moray.pipelines.decontaminate.text_units import Units, is_telling, units_of, without_spaces
from moray.pipelines.shared.documents import read_shard, write_parquet
from moray.pipelines.text.arrow import text_buffers
from moray.pipelines.text.characters import tables

LETTERS_A_WORD = 3  # of Thai, Khmer and the like, letters without their marks: so an n-gram is as long as elsewhere

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grams:
    """What an n-gram is: `size` words or characters, `telling` distinct ones of them more than a number or a letter
    (text_units.py). Texts of an item without one that long are wholes, from `least` on."""

    size: int = 13
    characters: bool = False
    least: int = 8
    telling: int = 3


@dataclass(frozen=True)
class Match:
    """An n-gram of an eval in a text: row of the text, n-gram, one of its places, and how the text writes it."""

    row: int
    gram: int
    place: int
    excerpt: str


@dataclass(frozen=True)
class EvalIndex:
    """items: (eval, name). item_of, texts and sizes are of pieces; sizes: units of an n-gram, 0 if not looked for.
    hashes: uint64 [G], ascending. N-gram g stands at bounds[g] : bounds[g + 1] of pieces_at and units_at.
    """

    characters: bool
    items: list[tuple[str, str]]
    texts: list[str]
    item_of: Integers
    sizes: Integers
    hashes: npt.NDArray[np.uint64]
    bounds: Integers
    pieces_at: Integers
    units_at: Integers
    _read: dict[int, Units] = field(default_factory=dict)  # pieces that were compared

    def find(self, texts: pa.ChunkedArray) -> list[Match]:
        """Every n-gram of an eval in each text, once, its text compared."""
        matches, row, units = [], -1, units_of("", self.characters)
        for text, gram, at in self._guesses(texts).tolist():
            if text != row:
                row, units = text, units_of(texts[text].as_py(), self.characters)
            if (match := self.verified(row, units, gram, at)) is not None:
                matches.append(match)
        return matches

    def _guesses(self, texts: pa.ChunkedArray) -> Integers:
        """int64 [_, 3]: text, n-gram and unit, by hash alone."""
        from moray.pipelines.decontaminate.matching import bitmap, scan

        sizes = np.unique(self.sizes[self.sizes > 0])
        where = (*text_buffers(texts), *tables(), self.characters, sizes, self.hashes, *bitmap(self.hashes))
        found = np.empty((1 << 14, 3), np.int64)
        if (count := scan(*where, found)) > len(found):
            found = np.empty((count, 3), np.int64)
            scan(*where, found)
        return found[:count]

    def verified(self, row: int, units: Units, gram: int, at: int) -> Match | None:
        """The match if at some place the n-gram has the text that begins with unit `at`, else None."""
        for place in range(self.bounds[gram], self.bounds[gram + 1]):
            piece = int(self.pieces_at[place])
            if units.holds(at, self._units(piece), int(self.units_at[place]), int(self.sizes[piece])):
                return Match(row, gram, place, units.excerpt(at, int(self.sizes[piece])))
        return None

    def items_with(self, gram: int, place: int) -> list[int]:
        """The items that have the n-gram as it is at this place."""
        piece, at = int(self.pieces_at[place]), int(self.units_at[place])
        here = slice(self.bounds[gram], self.bounds[gram + 1])
        others = zip(self.pieces_at[here].tolist(), self.units_at[here].tolist(), strict=True)
        size, units = int(self.sizes[piece]), self._units(piece)
        same = {p for p, u in others if self.sizes[p] == size and units.holds(at, self._units(p), u, size)}
        return sorted({int(self.item_of[p]) for p in same})

    def grams_of_items(self, without: Sequence[int] = ()) -> Integers:
        """int64 [I]: how many distinct n-grams each item has, but for some."""
        gram = np.repeat(np.arange(len(self.hashes)), np.diff(self.bounds))
        pairs = np.unique(np.stack((self.item_of[self.pieces_at], gram), axis=1), axis=0)
        kept = pairs[~np.isin(pairs[:, 1], np.array(without, np.int64)), 0]
        return np.bincount(kept, minlength=len(self.items)).astype(np.int64)

    def _units(self, piece: int) -> Units:
        if piece not in self._read:
            self._read[piece] = units_of(self.texts[piece], self.characters)
        return self._read[piece]

    def save(self, folder: Path) -> None:
        """Writes what `load_index` reads."""
        names = [self.items[item] for item in self.item_of]
        pieces = {
            "eval": pa.array([name for name, _ in names], pa.string()),
            "item": pa.array([item for _, item in names], pa.string()),
            "text": pa.array(self.texts, pa.large_string()),
            "size": pa.array(self.sizes, pa.int64()),
        }
        hashes = np.repeat(self.hashes, np.diff(self.bounds))
        write_parquet(folder / "pieces.parquet", pa.table(pieces))
        write_parquet(
            folder / "grams.parquet", pa.table({"hash": hashes, "piece": self.pieces_at, "unit": self.units_at})
        )


@lru_cache(maxsize=2)
def load_index(folder: Path, characters: bool) -> EvalIndex:
    """What `save` wrote; a worker keeps it for its next shards."""
    pieces, grams = read_shard(folder / "pieces.parquet"), read_shard(folder / "grams.parquet")
    names = list(zip(pieces["eval"].to_pylist(), pieces["item"].to_pylist(), strict=True))
    return _indexed(
        names,
        pieces["text"].to_pylist(),
        pieces["size"].to_numpy(),
        characters,
        grams["hash"].to_numpy(),
        grams["piece"].to_numpy(),
        grams["unit"].to_numpy(),
    )


def build_index(pieces: Sequence[EvalText], grams: Grams) -> EvalIndex:
    """The index of all items' n-grams, in the order of pieces."""
    from moray.pipelines.decontaminate.matching import hashes_of

    units = [units_of(piece.text, grams.characters) for piece in pieces]
    lengths = np.array([len(one) for one in units], np.int64)
    words = np.array([1 if grams.characters or not without_spaces(one) else LETTERS_A_WORD for one in units], np.int64)
    names = [(piece.eval, piece.item) for piece in pieces]
    sizes = _sizes(names, lengths, words, grams)
    texts = [piece.text for piece in pieces]
    offsets, data = text_buffers(pa.chunked_array([pa.array(texts, pa.large_string())]))
    hashes = np.empty(len(data), np.uint64)
    hashes = hashes[: hashes_of(offsets, data, *tables(), grams.characters, sizes, hashes)]
    counts = np.where(sizes > 0, lengths - sizes + 1, 0)
    piece_of = np.repeat(np.arange(len(pieces)), counts)
    unit_of = np.arange(len(hashes)) - np.repeat(np.cumsum(counts) - counts, counts)
    says = np.concatenate(
        [_telling(*pair, grams.telling, grams.characters) for pair in zip(units, sizes.tolist(), strict=True)]
    )
    order = np.flatnonzero(says)[np.argsort(hashes[says], kind="stable")]
    return _indexed(names, texts, sizes, grams.characters, hashes[order], piece_of[order], unit_of[order])


def _telling(units: Units, size: int, least: int, characters: bool) -> npt.NDArray[np.bool_]:
    """Of each n-gram whether at least so many distinct units of it are telling."""
    if not size:
        return np.zeros(0, bool)
    tells = {name: is_telling(name, characters) for name in set(units.names)}
    inside: Counter[str] = Counter()
    said = np.zeros(len(units) - size + 1, bool)
    for end, name in enumerate(units.names):
        if tells[name]:
            inside[name] += 1
        if end >= size and tells[left := units.names[end - size]]:
            inside[left] -= 1
            if not inside[left]:
                del inside[left]
        if end >= size - 1:
            said[end - size + 1] = len(inside) >= least
    return said


def _sizes(names: Sequence[tuple[str, str]], lengths: Integers, words: Integers, grams: Grams) -> Integers:
    """Of each piece how long its n-grams are, 0 for none. words: how many of its units count as a word."""
    sizes = grams.size * words
    whole = {name for name, fits in zip(names, (lengths >= sizes).tolist(), strict=True) if fits}
    short = np.array([name not in whole for name in names], bool)
    wholes = np.where(short & (lengths >= grams.least * words), lengths, 0)
    return np.where(lengths >= sizes, sizes, wholes)


def _indexed(
    names: list[tuple[str, str]],
    texts: list[str],
    sizes: Integers,
    characters: bool,
    hashes: npt.NDArray[np.uint64],
    piece_of: Integers,
    unit_of: Integers,
) -> EvalIndex:
    """From pieces, and from places in the order of their hashes."""
    items = {name: i for i, name in enumerate(dict.fromkeys(names))}
    distinct, starts = np.unique(hashes, return_index=True)
    return EvalIndex(
        characters=characters,
        items=list(items),
        texts=texts,
        item_of=np.array([items[name] for name in names], np.int64),
        sizes=sizes,
        hashes=distinct,
        bounds=np.append(starts, len(hashes)).astype(np.int64),
        pieces_at=piece_of,
        units_at=unit_of,
    )
