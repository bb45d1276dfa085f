"""dedup-parts against its definition (oracle.py), its guarantees on cut text, and its independence of the shards."""

from __future__ import annotations

import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moray.pipelines.dedup.parts import key_ranges
from moray.pipelines.dedup.parts import step as parts_step
from moray.pipelines.dedup.parts.scan import RepeatedPieces, scan_pieces
from moray.pipelines.dedup.parts.step import DedupPartsConfig
from moray.pipelines.dedup.parts.text_parts import cut_spans, normalized, parts_of
from moray.pipelines.dedup.parts.windows import fingerprints, gram_size, windows
from moray.pipelines.text.arrow import text_buffers
from moray.pipelines.text.characters import tables
from moray.platform.core.errors import InputError
from tests.examples import examples
from tests.pipelines.dedup.parts import oracle
from tests.pipelines.step_runs import Done, Interrupted, Page, run_in_process

# Words that repeat soon, in scripts with and without spaces, and what lies between them.
PIECES = (
    "a ",
    "B ",
    "b ",
    "\u00e9a ",
    "\u4e2d",
    "\u6587",
    "\U00020001",
    ", ",
    "\n",
    "\n\n",
    "c",
    "\u0301",
    "\U0001f600",
)


@pytest.mark.parametrize(
    ("one", "other"), [("cafe\u0301", "bar"), ("co\u00ad", "bar"), ("\u0915\u094d", "\u0915"), ("a", "\u00adb")]
)
def test_two_words_stay_two_where_a_cut_ends_beside_a_mark(one: str, other: str) -> None:
    assert cut_spans(f"{one}\u4e2d\u6587{other}", [(len(one), len(one) + 2)]) == f"{one} {other}"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Caf\u00e9 \ufb01n", "cafe\u0301  FIN"),
        ("a\u00adb\u200bc", "abc"),
        ("e\u00ad\u0301x", "\u00e9x"),
        ("\uff21", "a"),
    ],
)
def test_parts_are_the_same_in_every_form_of_unicode(one: str, other: str) -> None:
    assert normalized(one) == normalized(other)


drawn = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


def found_by_kernels(texts: list[str], tokens: int) -> tuple[set[tuple[int, int, int]], dict[Any, list[Any]]]:
    """Fingerprints as (row, place, key), and the windows near repeated fingerprints: hash -> positions."""
    column = pa.chunked_array([pa.array(texts, pa.large_string())])
    offsets, data = text_buffers(column)
    room, size = int(offsets[-1]), gram_size(tokens)
    keys, rows, places = np.empty(room, np.uint64), np.empty(room, np.int64), np.empty(room, np.int64)
    words = np.zeros(len(texts), np.int64)
    count = fingerprints(offsets, data, *tables(), tokens, size, words, keys, rows, places)
    assert words.tolist() == [len(oracle.placed_words(text)) for text in texts]
    shared = np.sort(key_ranges.repeated_keys([keys[:count]])[0])
    width = tokens - size + 1
    one, other = np.empty(len(shared) * width, np.uint64), np.empty(len(shared) * width, np.uint64)
    spots = np.empty((len(shared) * width, 5), np.int64)
    made = windows(offsets, data, *tables(), tokens, size, rows[shared], places[shared], one, other, spots)
    by_hash: dict[Any, list[Any]] = {}
    for i in range(made):
        by_hash.setdefault((int(one[i]), int(other[i])), []).append(tuple(spots[i].tolist()))
    return set(zip(rows[:count].tolist(), places[:count].tolist(), keys[:count].tolist(), strict=True)), by_hash


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30))
def test_rows_are_the_same_if_both_their_keys_are(rows: list[tuple[int, int]]) -> None:
    columns = [np.array([row[i] for row in rows], np.uint64) for i in (0, 1)]
    found, groups = key_ranges.repeated_keys(columns)
    assert sorted(found.tolist()) == [i for i, row in enumerate(rows) if rows.count(row) > 1]
    names = {rows[i]: group for i, group in zip(found.tolist(), groups.tolist(), strict=True)}
    assert all(names[rows[i]] == group for i, group in zip(found.tolist(), groups.tolist(), strict=True))
    assert sorted(names.values()) == list(range(len(names)))


@settings(max_examples=examples(150), deadline=None)
@given(texts=st.lists(drawn, min_size=1, max_size=4), tokens=st.integers(2, 9))
def test_every_repeat_of_so_many_words_is_found_and_nothing_shorter(texts: list[str], tokens: int) -> None:
    _, by_hash = found_by_kernels(texts, tokens)
    found = {frozenset(spot[:3] for spot in spots) for spots in by_hash.values() if len(spots) > 1}
    expected: dict[Any, set[Any]] = {}
    for row, text in enumerate(texts):
        for name, begin, end in oracle.windows(text, tokens):
            expected.setdefault(name, set()).add((row, begin, end))
    assert found == {frozenset(spots) for spots in expected.values() if len(spots) > 1}
    assert all(spot[4] - spot[3] == tokens for spots in by_hash.values() for spot in spots)


def test_a_sixteenth_of_the_words_are_fingerprints() -> None:
    generator = random.Random(1)
    text = " ".join(f"w{generator.randrange(10**9)}" for _ in range(8000))
    chosen, _ = found_by_kernels([text], 50)
    assert len(chosen) / 8000 == pytest.approx(2 / 32, rel=0.1)
    places = sorted(place for _, place, _ in chosen)
    assert all(after - before <= 50 - gram_size(50) + 1 for before, after in pairwise(places))


@given(drawn, st.sampled_from(["line", "paragraph"]))
def test_parts_are_the_text(text: str, unit: str) -> None:
    bounds = list(parts_of(text, unit))
    assert "".join(text[begin:end] for begin, end in bounds) == text
    assert bounds == list(oracle._bounds(text, unit))


def test_text_around_a_cut_is_unchanged() -> None:
    assert cut_spans("one, two; three.\n", [(5, 8)]) == "one, ; three.\n"
    assert cut_spans("abc\u4e2ddef", [(3, 4)]) == "abc def"
    assert cut_spans("abc\u4e2d\u6587def", [(3, 4)]) == "abc\u6587def"
    assert cut_spans("\u4e2ddef", [(0, 1)]) == "def"
    assert cut_spans("abc", []) == "abc"


def one_document(groups: list[list[int]], copies: int = 1) -> list[list[bool]]:
    """Whether each window is cut, in documents of overlapping windows of three words, given by their groups."""
    bounds = np.cumsum([0, *map(len, groups)])
    begins = np.concatenate([np.arange(len(one)) for one in groups]).astype(np.int64)
    pieces = RepeatedPieces(
        bounds, begins * 2, begins * 2 + 5, begins, begins + 3, np.concatenate(groups).astype(np.int64)
    )
    many = np.full(len(groups), 10**6)
    found = scan_pieces(pieces, many, many, copies, 1.0, 0)
    return [found.cut[a:b].tolist() for a, b in pairwise(bounds.tolist())]


def test_overlapping_windows_do_not_cause_each_others_removal() -> None:
    assert one_document([[0, 0, 0, 0]]) == [[False] * 3 + [True]], "three words of a run of equal words are kept"
    first, second, third = one_document([[0], [0, 1, 2, 3], [3]])
    assert first == [False]
    assert second == [True, False, False, False]
    assert third == [True], "the fourth window of the second document is intact"
    assert one_document([[0], [0, 1], [1]])[2] == [False], "a window that is partly cut is no intact copy"
    assert one_document([[0], [0], [0], [0]], copies=2) == [[False], [False], [True], [True]]


CONFIGS = [
    DedupPartsConfig(unit="substring", tokens=5, min_words=4, max_loss=0.9, prefer=("best",)),
    DedupPartsConfig(unit="substring", tokens=6, min_words=0, max_loss=1.0, copies=2),
    DedupPartsConfig(unit="line", min_characters=6, min_words=3, max_loss=0.7, prefer=("best",)),
    DedupPartsConfig(unit="paragraph", min_characters=6, min_words=0, max_loss=1.0),
]


def corpus(generator: random.Random, count: int) -> list[Page]:
    """Texts of shared lines, copied pieces of lines, and unique lines."""
    lines = [" ".join(f"w{generator.randrange(40)}" for _ in range(generator.randrange(1, 12))) for _ in range(20)]
    made = []
    for number in range(count):
        text = ""
        for _ in range(generator.randrange(1, 9)):
            line = generator.choice(lines)
            begin = generator.randrange(len(line))
            line = generator.choice([line, line.upper(), line[begin:], f"own{number} {generator.random()}"])
            text += line + generator.choice(["\n", " \n\n", ". ", "\n  \n\n    "])
        made.append(Page(text, str(number), generator.choice(["best", "s"])))
    return made


def check(done: Done, pages: list[Page], config: DedupPartsConfig) -> oracle.Outcome:
    size = config.tokens if config.unit == "substring" else config.min_characters
    limits = (config.copies, config.max_loss, config.min_words, config.prefer)
    expected = oracle.outcome(pages, config.unit, size, *limits)
    assert {row["id"]: row["reason"] for row in done.rows("removed-")} == expected.gone
    kept = done.kept()
    assert set(kept) == {page.id for page in pages} - set(expected.gone)
    edited = {row["id"]: row for row in done.rows("edited-")}
    assert set(edited) == set(expected.cut)
    for page in pages:
        if page.id in expected.cut:
            row, cut = edited[page.id], expected.cut[page.id]
            left = "".join(c for i, c in enumerate(page.text) if i not in cut)
            assert kept[page.id].replace(" ", "") == left.replace(" ", "")
            assert (row["characters"], row["characters_after"]) == (len(page.text), len(kept[page.id]))
            assert row["parts"] == sum(i - 1 not in cut for i in cut)
            assert row["partner"] in kept
        elif page.id in kept:
            assert kept[page.id] == page.text
    return expected


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.unit}-{config.copies}")
def test_results_are_those_of_the_definition_for_any_shards_and_ranges(
    config: DedupPartsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(1 if os.environ.get("QUICK_EXAMPLES") else 3):
        generator = random.Random(seed)
        pages, results = corpus(generator, 40), []
        for shards, rows in ((1, 10**6), (3, 50), (7, 8)):
            monkeypatch.setattr(key_ranges, "_RANGE_ROWS", rows)
            generator.shuffle(pages)
            folder = tmp_path / f"{seed}-{shards}"
            done = run_in_process(parts_step, config, folder, pages, shards, monkeypatch)
            expected = check(done, pages, config)
            results.append((done.kept(), done.rows("removed-"), done.rows("edited-"), done.counts))
        assert len(expected.cut) > 5
        assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("seed", range(4))
def test_no_repeat_is_left_and_nothing_loses_its_last_copy(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From input and output alone: every cut word is in a window that is intact in a kept document."""
    tokens = 5
    config = DedupPartsConfig(unit="substring", tokens=tokens, min_words=0, max_loss=1.0)
    pages = corpus(random.Random(seed), 60)
    done = run_in_process(parts_step, config, tmp_path, pages, 3, monkeypatch)
    cut = check(done, pages, config).cut
    gone = {row["id"] for row in done.rows("removed-")}
    stands: dict[Any, list[Any]] = {}
    for page in pages:
        here = set(range(len(page.text))) if page.id in gone else cut.get(page.id, set())
        for name, begin, end in oracle.windows(page.text, tokens):
            if not here & set(range(begin, end)):
                stands.setdefault(name, []).append((page.id, begin, end))
    for spots in stands.values():
        apart = [(a, b) for a in spots for b in spots if a < b and (a[0] != b[0] or a[2] <= b[1])]
        assert not apart, "a repeat is left"
    lost = 0
    for page in pages:
        here = set(range(len(page.text))) if page.id in gone else cut.get(page.id, set())
        covered: set[int] = set()
        for name, begin, end in oracle.windows(page.text, tokens):
            if name in stands:
                covered |= set(range(begin, end))
        for _, begin, end in oracle.placed_words(page.text):
            if set(range(begin, end)) & here:
                lost += 1
                assert set(range(begin, end)) <= covered, "a word lost its last copy"
    assert lost > 100


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Done:
    with pytest.MonkeyPatch.context() as monkeypatch:
        pages = corpus(random.Random(5), 30)
        return run_in_process(parts_step, CONFIGS[0], tmp_path_factory.mktemp("whole"), pages, 3, monkeypatch)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 6, 7, 9])
def test_an_interrupted_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, uninterrupted: Done
) -> None:
    pages, config = corpus(random.Random(5), 30), CONFIGS[0]
    with pytest.raises(Interrupted):
        run_in_process(parts_step, config, tmp_path / "it", pages, 3, monkeypatch, stop_after)
    assert run_in_process(parts_step, config, tmp_path / "it", pages, 3, monkeypatch) == uninterrupted


def test_counts_and_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = " ".join(f"shared{i}" for i in range(60))
    pages = [
        Page(f"{shared} and much that is its own, " + "x " * 30, "long"),
        Page(f"Before it. {shared}. After it there are some more words, enough to stay in the corpus.", "short"),
        Page(shared, "bare"),
    ]
    config = DedupPartsConfig(unit="substring", min_words=5, max_loss=0.95)
    done = run_in_process(parts_step, config, tmp_path, pages, 2, monkeypatch)
    kept = {page.key: done.kept().get(page.id) for page in pages}
    assert kept["short"] == "Before it. . After it there are some more words, enough to stay in the corpus."
    assert kept["bare"] is None
    assert kept["long"] == pages[0].text
    removed = done.rows("removed-")[0]
    assert removed["reason"] == "nothing_left"
    assert removed["partner"] == pages[0].id or removed["partner"] == pages[1].id
    assert done.counts["edited"] == done.counts["dropped:nothing_left"] == 1


def test_fields_of_the_other_unit_are_refused() -> None:
    with pytest.raises(ValidationError, match="`tokens` has no effect with `unit: line`"):
        DedupPartsConfig(unit="line", tokens=40)
    with pytest.raises(ValidationError, match="min_characters"):
        DedupPartsConfig(unit="substring", min_characters=40)


def test_removing_every_document_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DedupPartsConfig(unit="line", min_characters=2, max_loss=0.5)
    with pytest.raises(InputError, match="removes every document"):
        run_in_process(parts_step, config, tmp_path, [Page("ab cd\n" * 9, "a")], 1, monkeypatch)
