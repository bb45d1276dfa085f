"""An index of the n-grams of evals by hash, with the items of each, and the search of texts for them.

Matches by hash are verified by comparing the text. The n-grams of an item are those of its texts (fields). If all texts
of an item are shorter than an n-gram, each text of the minimum length is searched for as a whole; an item without such
a text is too short to search for. Uninformative n-grams, such as 1 2 3 ... 13 or 8 9 a b c d, are excluded: they have
few distinct words of more than a number or a single letter.

Shapes: G distinct n-grams, M occurrences of n-grams in pieces, I items, P pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moray.pipelines.decontaminate.evals import EvalText
from moray.pipelines.decontaminate.text_units import Units, is_telling, units_of, without_spaces
from moray.pipelines.shared.documents import read_shard, write_parquet
from moray.pipelines.text.arrow import text_buffers
from moray.pipelines.text.characters import tables
from moray.platform.store.paths import AnyPath

LETTERS_A_WORD = 3  # letters (without marks) that count as one word in Thai, Khmer and other scripts without spaces

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grams:
    """The definition of an n-gram: `size` words or characters, of which at least `telling` distinct ones are
    informative (`is_telling`). Texts of at least `shortest` units are searched for as wholes if their item has no
    text of `size` units."""

    size: int = 13
    characters: bool = False
    shortest: int = 8
    telling: int = 3


@dataclass(frozen=True)
class Match:
    """An n-gram of an eval in a text: row of the text, n-gram, one of its places, and the passage as written."""

    row: int
    gram: int
    place: int
    excerpt: str


@dataclass(frozen=True)
class EvalIndex:
    """The index. items: (eval, name) of each item. item_of, texts, sizes: [P]; sizes: units per n-gram, or 0 if the
    piece is not searched for. hashes: uint64 [G], ascending. The occurrences of n-gram g are bounds[g] : bounds[g + 1]
    of pieces_at and units_at."""

    characters: bool
    items: list[tuple[str, str]]
    texts: list[str]
    item_of: Integers
    sizes: Integers
    hashes: npt.NDArray[np.uint64]
    bounds: Integers
    pieces_at: Integers
    units_at: Integers
    _read: dict[int, Units] = field(default_factory=dict)  # cache: the units of pieces

    def find(self, texts: pa.ChunkedArray) -> list[Match]:
        """All verified matches in the texts, one per text and n-gram."""
        matches, row, units = [], -1, units_of("", self.characters)
        for text, gram, at in self._hash_matches(texts).tolist():
            if text != row:
                row, units = text, units_of(texts[text].as_py(), self.characters)
            if (match := self.verified(row, units, gram, at)) is not None:
                matches.append(match)
        return matches

    def _hash_matches(self, texts: pa.ChunkedArray) -> Integers:
        """Unverified matches by hash: text, n-gram and first unit, int64 [_, 3]."""
        from moray.pipelines.decontaminate.matching import bitmap, scan

        sizes = np.unique(self.sizes[self.sizes > 0])
        where = (*text_buffers(texts), *tables(), self.characters, sizes, self.hashes, *bitmap(self.hashes))
        found = np.empty((1 << 14, 3), np.int64)
        if (count := scan(*where, found)) > len(found):
            found = np.empty((count, 3), np.int64)
            scan(*where, found)
        return found[:count]

    def verified(self, row: int, units: Units, gram: int, at: int) -> Match | None:
        """The match, if the n-gram at any of its places equals the text from unit `at` on; else None."""
        for place in range(self.bounds[gram], self.bounds[gram + 1]):
            piece = int(self.pieces_at[place])
            if units.holds(at, self._units(piece), int(self.units_at[place]), int(self.sizes[piece])):
                return Match(row, gram, place, units.excerpt(at, int(self.sizes[piece])))
        return None

    def items_with(self, gram: int, place: int) -> list[int]:
        """The items that contain the n-gram with the text that it has at this place."""
        piece, at = int(self.pieces_at[place]), int(self.units_at[place])
        places = slice(self.bounds[gram], self.bounds[gram + 1])
        others = zip(self.pieces_at[places].tolist(), self.units_at[places].tolist(), strict=True)
        size, units = int(self.sizes[piece]), self._units(piece)
        same = {p for p, u in others if self.sizes[p] == size and units.holds(at, self._units(p), u, size)}
        return sorted({int(self.item_of[p]) for p in same})

    def grams_of_items(self, without: Sequence[int] = ()) -> Integers:
        """The number of distinct n-grams of each item, excluding the n-grams `without`, int64 [I]."""
        gram = np.repeat(np.arange(len(self.hashes)), np.diff(self.bounds))
        pairs = np.unique(np.stack((self.item_of[self.pieces_at], gram), axis=1), axis=0)
        kept = pairs[~np.isin(pairs[:, 1], np.array(without, np.int64)), 0]
        return np.bincount(kept, minlength=len(self.items)).astype(np.int64)

    def _units(self, piece: int) -> Units:
        if piece not in self._read:
            self._read[piece] = units_of(self.texts[piece], self.characters)
        return self._read[piece]

    def save(self, folder: AnyPath) -> None:
        """Writes the index to files that `load_index` reads."""
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
def load_index(folder: AnyPath, characters: bool) -> EvalIndex:
    """Reads an index that `save` wrote. Cached, because a worker searches several shards."""
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
    """Builds the index of the n-grams of all items. items: in the order of pieces."""
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
    telling = np.concatenate(
        [_telling(*pair, grams.telling, grams.characters) for pair in zip(units, sizes.tolist(), strict=True)]
    )
    order = np.flatnonzero(telling)[np.argsort(hashes[telling], kind="stable")]
    return _indexed(names, texts, sizes, grams.characters, hashes[order], piece_of[order], unit_of[order])


def _telling(units: Units, size: int, minimum: int, characters: bool) -> npt.NDArray[np.bool_]:
    """Whether each n-gram has at least `minimum` distinct informative units."""
    if not size:
        return np.zeros(0, bool)
    informative = {name: is_telling(name, characters) for name in set(units.names)}
    inside: Counter[str] = Counter()
    enough = np.zeros(len(units) - size + 1, bool)
    for end, name in enumerate(units.names):
        if informative[name]:
            inside[name] += 1
        if end >= size and informative[left := units.names[end - size]]:
            inside[left] -= 1
            if not inside[left]:
                del inside[left]
        if end >= size - 1:
            enough[end - size + 1] = len(inside) >= minimum
    return enough


def _sizes(names: Sequence[tuple[str, str]], lengths: Integers, words: Integers, grams: Grams) -> Integers:
    """The length of each piece's n-grams in units, 0 for none. words: the units that count as one word."""
    sizes = grams.size * words
    long_items = {name for name, fits in zip(names, (lengths >= sizes).tolist(), strict=True) if fits}
    short = np.array([name not in long_items for name in names], bool)
    wholes = np.where(short & (lengths >= grams.shortest * words), lengths, 0)
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
    """Assembles the index. hashes, piece_of, unit_of: occurrences of n-grams, sorted by hash."""
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
