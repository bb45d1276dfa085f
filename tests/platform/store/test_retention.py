"""Retention: never removes protected artifacts or ancestors of kept ones, and removes the oldest first."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.platform.core.errors import InputError
from moray.platform.core.units import parse_size, size
from moray.platform.store.retention import Entry, lineage, to_free, to_remove

CHAIN = [
    Entry("corpus/1", 100, 1.0),
    Entry("filter/1", 50, 2.0, ("corpus/1",)),
    Entry("dedup/1", 50, 3.0, ("filter/1",)),
    Entry("corpus/2", 100, 4.0),
    Entry("filter/2", 50, 5.0, ("corpus/2", "gone/0")),
]


def removed(roots: list[str], limit: int) -> list[str]:
    return [entry.reference for entry in to_remove(CHAIN, roots, limit)]


def test_nothing_is_removed_while_all_fits() -> None:
    assert removed([], 350) == []


def test_artifacts_are_removed_before_their_inputs_and_oldest_first() -> None:
    assert removed([], 0) == ["dedup/1", "filter/1", "corpus/1", "filter/2", "corpus/2"]
    assert removed([], 349) == ["dedup/1"]
    assert removed([], 300) == ["dedup/1"]
    assert removed([], 299) == ["dedup/1", "filter/1"]


def test_copies_go_by_age_alone_and_only_copies() -> None:
    entries = [replace(entry, copied=entry.reference != "corpus/2") for entry in CHAIN]
    assert [entry.reference for entry in to_free(entries, [], 250)] == ["corpus/1"]
    assert [entry.reference for entry in to_free(entries, [], 0)] == ["corpus/1", "filter/1", "dedup/1", "filter/2"]
    assert [entry.reference for entry in to_free(entries, ["filter/1"], 0)] == ["dedup/1", "filter/2"]
    assert to_free(CHAIN, [], 0) == []


def test_roots_and_their_ancestors_stay_whatever_the_limit() -> None:
    assert removed(["filter/1"], 0) == ["dedup/1", "filter/2", "corpus/2"]
    assert removed(["dedup/1", "filter/2"], 0) == []
    assert removed(["not/here"], 0) == removed([], 0)


@st.composite
def stores(draw: st.DrawFn) -> tuple[list[Entry], list[str], int]:
    """Up to 12 artifacts, each made from earlier ones."""
    entries: list[Entry] = []
    for i in range(draw(st.integers(0, 12))):
        inputs = draw(st.lists(st.sampled_from([e.reference for e in entries]), max_size=3)) if entries else []
        entries.append(Entry(f"s/{i}", draw(st.integers(0, 9)), draw(st.integers(0, 3)), tuple(inputs)))
    names = [entry.reference for entry in entries]
    return entries, draw(st.lists(st.sampled_from(names))) if names else [], draw(st.integers(0, 60))


@given(stores())
def test_the_rest_keeps_its_ancestors_and_no_more_is_removed_than_needed(
    store: tuple[list[Entry], list[str], int],
) -> None:
    entries, roots, limit = store
    chosen = to_remove(entries, roots, limit)
    gone = {entry.reference for entry in chosen}
    left = [entry for entry in entries if entry.reference not in gone]
    assert len(gone) == len(chosen)
    assert not lineage(roots, {e.reference: e for e in entries}) & gone
    assert not [name for entry in left for name in entry.inputs if name in gone], "an ancestor is missing"
    remaining = sum(entry.bytes for entry in left)
    if chosen:
        assert remaining + chosen[-1].bytes > limit, "the last one need not have gone"
    if remaining > limit:
        assert {entry.reference for entry in left} == lineage(roots, {e.reference: e for e in entries})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10GB", 10**10), ("1.5TiB", 3 << 39), ("512 MiB", 1 << 29), ("7", 7), ("0", 0), ("3kb", 3000), ("2g", 2 * 10**9)],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "10XB", "-1GB", "1iB", "ten"])
def test_an_invalid_size_is_rejected(text: str) -> None:
    with pytest.raises(InputError, match="invalid size"):
        parse_size(text)


def test_sizes_are_shown() -> None:
    assert [size(value) for value in (0, 512, 1250, 12_345_678, 10**10)] == [
        "0 B",
        "512 B",
        "1.25 kB",
        "12.3 MB",
        "10 GB",
    ]
