"""dedup against its definition (oracle.py), and its independence of the order and the number of shards."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.dedup import decide, dedup_index, phases
from moray.pipelines.dedup.config import DedupConfig
from moray.pipelines.dedup.find import find, near_candidates
from moray.pipelines.dedup.graph import LARGEST, candidates, components, forest
from moray.pipelines.dedup.priority_order import DocumentColumns, sources_by
from moray.pipelines.shared.documents import content_hash, document_id
from moray.pipelines.text.minhash import Shingling
from moray.pipelines.text.shingles import sort_shingles
from tests.examples import examples
from tests.pipelines.dedup import oracle
from tests.pipelines.dedup.runs import kept, removed, run_step
from tests.pipelines.step_runs import Interrupted

# Words of several scripts: folded letters, marks that belong to words, scripts without spaces, what is not seen.
SCRIPTS = (
    "aB", "z_9", "\u00e9", "\u00c9", "\u00df", "\u0130", "\u0301", "\u0416", "\u0436", "\u0915", "\u093f", "\u4e2d",
    "\u6587", "\u304b", "\u30ca", "\u30fc", "\uac00", "\U00020001", "\U0001f600", "\U0001d400", "\ufb01", ".", ",", "-",
    " ", "\n", "i", "K", "\u212a", "longerth", "internationalisation", "\u201cquoted\u201d", "." * 70,
    "\u00ad", "\u200b", "\u200d", "\ufeff", "\U000e0101", "\u0640", "\u0131", "\u03c2", "\u03a3", "\u1e9e", "\uff21",
    "\uff76", "\uff9e", "\ufb03", "\u2153", "\u00bd", "\u337f", "\ufdfa", "\u2460", "\u2122", "\u1100", "\u1161",
    "\u11a8", "\u0e01", "\u0e33", "\u0e38", "\u0e49", "\u0e51", "\u1780", "\u17b6", "\u17d2", "\u1000", "\u1031",
    "\u0bca", "\u0cb5", "\u0ccb", "\ua984", "\u00b4", "\u2026",
)  # fmt: skip
mixed = st.lists(st.sampled_from(SCRIPTS), max_size=30).map("".join)


def column(texts: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(texts, pa.large_string())])


@pytest.mark.parametrize("unit", ["words", "characters"])
@settings(max_examples=examples(150), deadline=None)
@given(texts=st.lists(mixed, min_size=1, max_size=4), size=st.integers(1, 6))
def test_shingles_are_those_of_the_definition(unit: str, texts: list[str], size: int) -> None:
    shingling = Shingling(size, unit == "characters")
    sets, bounds = shingling.sets(column(texts))
    found = [set(sets[begin:end].tolist()) for begin, end in pairwise(bounds)]
    expected = [oracle.shingles(text, size, unit) for text in texts]
    assert [len(one) for one in found] == [len(one) for one in expected]
    for i in range(len(texts)):
        for j in range(i):
            assert len(found[i] & found[j]) == len(expected[i] & expected[j])
    keys, counts = shingling.keys(column(texts))
    for i in range(len(texts)):
        assert (counts[i] > 0) == bool(expected[i])
        for j in range(i):
            if expected[i] and expected[i] == expected[j]:
                assert (keys[i] == keys[j]).all()


@pytest.mark.parametrize("seed", range(8))
def test_a_long_text_has_the_words_of_its_parts(seed: int) -> None:
    """Words are found some thousand at a time: those that such a part begins or ends in are whole, too."""
    generator = random.Random(seed)
    parts = ["".join(generator.choices(SCRIPTS, k=generator.randrange(1, 5))) for _ in range(9000)]
    parts[3000:3002] = ["x" * 9000, "\u00e9" * 9000]
    shingling = Shingling(size=1)
    found, _ = shingling.sets(column([" ".join(parts)]))
    expected, _ = shingling.sets(column(parts))
    assert (found == np.unique(expected)).all()
    assert len(found) == len(oracle.shingles(" ".join(parts), 1, "words"))


@pytest.mark.parametrize("copies", [1, 7, 1000])
def test_hashes_are_sorted_document_by_document(copies: int) -> None:
    generator = np.random.default_rng(copies)
    sizes = np.array([0, 1, 2, 3, 5, 900, 0, 4096, 70_000])
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    drawn = generator.integers(0, 1 << 64, -(-bounds[-1] // copies), np.uint64)
    values = generator.permutation(np.repeat(drawn, copies)[: bounds[-1]])
    values[5] = values[2000] = (1 << 64) - 1
    expected = np.concatenate([np.sort(values[begin:end]) for begin, end in pairwise(bounds.tolist())])
    sort_shingles(bounds, values)
    assert (values == expected).all()


def test_parts_of_a_column_are_read_where_they_lie() -> None:
    texts = [f"{i} and some more words {i * i} of it" for i in range(9)]
    whole, _ = Shingling().keys(column(texts))
    parts = pa.chunked_array([pa.array(texts[:4], pa.large_string()), pa.array(texts[4:], pa.large_string())])
    assert (Shingling().keys(parts)[0] == whole).all()
    assert (Shingling().keys(column(texts).slice(3, 4))[0] == whole[3:7]).all()
    assert Shingling().keys(pa.chunked_array([], pa.large_string()))[0].shape == (0, 16)
    assert len(Shingling().sets(column(["", "?"]))[0]) == 0


def test_keys_are_shared_as_often_as_the_theory_says() -> None:
    """1 - (1 - s^rows)^bands, within four deviations of 400 pairs; sets of single words, so that s is exact."""
    generator = random.Random(4)
    for common, total in ((60, 100), (72, 100), (80, 100), (90, 100)):
        firsts, seconds = [], []
        for pair in range(400):
            vocabulary = [f"w{pair}x{i}" for i in range(total)]
            generator.shuffle(vocabulary)
            own = (total - common) // 2
            firsts.append(" ".join(vocabulary[: common + own]))
            seconds.append(" ".join(vocabulary[:common] + vocabulary[common + own :]))
        shingling = Shingling(size=1, seed=common)
        one, other = shingling.keys(column(firsts))[0], shingling.keys(column(seconds))[0]
        share = (one == other).any(axis=1).mean()
        theory = shingling.chance(common / total)
        assert theory == pytest.approx(1 - (1 - (common / total) ** 7) ** 16)
        assert share == pytest.approx(theory, abs=4 * (theory * (1 - theory) / 400) ** 0.5)


def documents(texts: list[oracle.Text], config: DedupConfig) -> DocumentColumns:
    return DocumentColumns(
        ids=np.array([one.id for one in texts], "S"),
        hashes=np.array([content_hash(one.text) for one in texts], "S"),
        sources=sources_by(config.prefer, [one.source for one in texts]),
        qualities=np.zeros(len(texts)),
        lengths=np.array([len(one.text) for one in texts]),
    )


def found(texts: list[oracle.Text], config: DedupConfig) -> pa.Table:
    ordered, order = documents(texts, config).in_priority_order()
    sets = [oracle.shingles(texts[i].text, config.shingle) for i in order]
    keys, shingles = config.shingling.keys(column([one.text for one in texts]))
    pairs = near_candidates(ordered, keys[order], shingles[order]).pairs
    scores = np.array([oracle.jaccard(sets[a], sets[b]) for a, b in pairs.tolist()])
    if not config.similarity:
        scores = np.ones(len(pairs))
    return find(ordered, pairs, scores, config.similarity).removed.sort_by("id")


# Many bands of one row: any two similar documents are candidates.
SURE = DedupConfig(bands=96, rows=1, similarity=0.7, shingle=2, prefer=("best",))
changed = st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from(["best", "s"]))


def drawn(picks: list[tuple[int, int, str]]) -> list[oracle.Text]:
    """Copies of a few texts with some words changed: chains of documents, each similar to the next."""
    texts = []
    for number, (base, shift, source) in enumerate(picks):
        words = [f"b{base}w{i + 2 * shift}" for i in range(24)]
        texts.append(oracle.Text(document_id("d", str(number)), " ".join(words), source))
    return texts


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(changed, min_size=1, max_size=20), st.randoms())
def test_removed_documents_are_those_of_the_definition_in_any_order(picks: Any, generator: random.Random) -> None:
    texts = drawn(picks)
    gone = oracle.removed(texts, SURE.similarity, SURE.shingle, SURE.prefer)
    for _ in range(2):
        table = found(texts, SURE)
        rows = table.to_pylist()
        assert {row["id"]: row["representative"] for row in rows} == gone
        generator.shuffle(texts)
    assert found(texts, SURE).equals(table)
    by_id = {one.id: one for one in texts}
    for row in rows:
        one, partner = by_id[row["id"]], by_id[row["partner"]]
        similarity = oracle.jaccard(*(oracle.shingles(text.text, SURE.shingle) for text in (one, partner)))
        assert row["similarity"] == pytest.approx(similarity)
        assert similarity >= SURE.similarity, "every removed document has a similar partner"
        assert (row["reason"] == "exact") == (one.text == by_id[row["representative"]].text)
    kept = {one.id for one in texts} - set(gone)
    assert kept
    assert set(gone.values()) <= kept, "text-dedup 0.4.1 loses every member of a cluster"


@pytest.mark.parametrize(("least", "minima", "expected"), [(0.7, 112, (14, 8)), (0.9, 112, (6, 18)), (0.5, 1, (1, 1))])
def test_bands_follow_from_a_threshold(least: float, minima: int, expected: tuple[int, int]) -> None:
    assert Shingling.for_threshold(least, minima) == expected
    bands, rows = expected
    made = DedupConfig(threshold=least, bands=minima, rows=1).shingling
    assert (made.bands, made.rows) == (bands, rows)


def test_the_document_of_higher_quality_is_kept_even_if_it_is_shorter() -> None:
    texts = [oracle.Text(str(i), " ".join(f"w{k}" for k in range(30 - i))) for i in range(3)]
    made = documents(texts, SURE)
    rated = replace(made, qualities=np.array([0.1, 0.7, 0.7]))
    ordered, _ = rated.in_priority_order()
    pairs = np.array([[0, 1], [1, 2]])
    assert find(made.in_priority_order()[0], pairs, np.ones(2), 0.7).removed["representative"].to_pylist() == ["0", "0"]
    assert find(ordered, pairs, np.ones(2), 0.7).removed["representative"].to_pylist() == ["1", "1"]


def test_without_verification_all_candidates_are_duplicates() -> None:
    texts = [oracle.Text(str(i), f"a b c d e f g h {i}") for i in range(4)]
    loose = DedupConfig(bands=96, rows=1, shingle=1, similarity=0)
    assert len(found(texts, loose)) == 3
    assert len(found(texts, loose.model_copy(update={"similarity": 0.95}))) == 0


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_components_are_those_of_scipy(count: int, edges: list[tuple[int, int]]) -> None:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    pairs = np.array([(a % count, b % count) for a, b in edges], np.int64).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    least = {label: int(np.flatnonzero(labels == label)[0]) for label in labels}
    assert components(count, pairs).tolist() == [least[label] for label in labels]


@settings(max_examples=examples(60), deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60),
    st.lists(st.integers(0, 59), max_size=5),
)
def test_forests_of_parts_are_a_forest_of_the_whole(edges: list[tuple[int, int]], cuts: list[int]) -> None:
    """For any partition of the edges. It is a forest: it has as many edges as documents minus components."""
    pairs = np.array(edges, np.int64).reshape(-1, 2) * 1_000_000_007  # numbers are far apart
    parts = [forest(part) for part in np.split(pairs, sorted(min(cut, len(pairs)) for cut in cuts))]
    whole = forest(np.concatenate(parts))
    assert {tuple(pair) for pair in whole.tolist()} <= {tuple(pair) for pair in pairs.tolist()}
    numbers, places = np.unique(pairs, return_inverse=True)
    labels = components(len(numbers), places.reshape(-1, 2))
    assert (components(len(numbers), np.searchsorted(numbers, whole)) == labels).all()
    assert len(whole) == len(numbers) - len(set(labels.tolist()))


@pytest.mark.parametrize("order", ["up", "down", "shuffled"])
def test_a_chain_of_a_million_is_one_component(order: str) -> None:
    """Other implementations stop after ten rounds with several components."""
    count = 1_000_000
    pairs = np.stack((np.arange(count - 1), np.arange(1, count)), axis=1)
    if order != "up":
        pairs = pairs[::-1] if order == "down" else np.random.default_rng(1).permutation(pairs)
    assert not components(count, np.ascontiguousarray(pairs)).any()


def test_a_large_bucket_makes_few_pairs_and_one_component() -> None:
    many = 50 * LARGEST
    keys = np.zeros((many + 1, 2), np.uint64)
    keys[-1] = (7, 8)
    made = candidates(keys, np.arange(many + 1))
    assert made.capped == 2
    assert len(made.pairs) <= LARGEST**2 // 2 + 2 * many
    assert (components(many + 1, made.pairs) == [0] * many + [many]).all()


def near_texts(count: int) -> list[oracle.Text]:
    """Long texts, one in three a changed copy of an earlier one."""
    generator = random.Random(2)
    texts: list[list[str]] = []
    for _ in range(count):
        words = [f"w{generator.randrange(3000)}" for _ in range(150)]
        if texts and generator.random() < 0.35:
            words = list(generator.choice(texts))
            for _ in range(generator.randrange(9)):
                words[generator.randrange(len(words))] = "other"
        texts.append(words)
    sources = [generator.choice(["best", "s"]) for _ in texts]
    return [oracle.Text(document_id("n", str(i)), " ".join(words), sources[i]) for i, words in enumerate(texts)]


@pytest.fixture(scope="module")
def corpus() -> list[oracle.Text]:
    return near_texts(160)


def test_the_number_of_shards_changes_nothing(
    tmp_path: Path, corpus: list[oracle.Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run_step(tmp_path / "1", corpus, 1, monkeypatch)
    assert len(removed(one)) > 30
    gone = oracle.removed(corpus, 0.7, prefer=("best",))
    rows = removed(one).to_pylist()
    assert {row["id"]: row["representative"] for row in rows} == gone
    for shards, parts in ((2, 1), (7, 4)):  # also varies the number of groups, files and forests
        monkeypatch.setattr(phases, "_GROUP_CHARACTERS", 20_000 // parts)
        monkeypatch.setattr(phases, "_FILE_PAIRS", 100 // parts)
        monkeypatch.setattr(decide, "_SHINGLES", 20_000 // parts)
        monkeypatch.setattr(phases, "_EDGES", 200 // parts)  # so that forests are merged in a tree
        monkeypatch.setattr(dedup_index, "_RANGE_ENTRIES", 40)
        other = run_step(tmp_path / str(shards), corpus, shards, monkeypatch)
        assert removed(other).equals(removed(one))
        assert kept(other) == kept(one)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, corpus: list[oracle.Text]) -> dict[str, pa.Table]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_step(tmp_path_factory.mktemp("whole"), corpus, 4, monkeypatch)


@pytest.mark.parametrize("stop_after", [0, 1, 3, 4, 5, 40, 68, 69, 71, 73, 74, 75, 77])
def test_an_interrupted_run_resumes(
    tmp_path: Path,
    corpus: list[oracle.Text],
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
    uninterrupted: dict[str, pa.Table],
) -> None:
    """Four shards are signed, read again and written, 64 bands compared: a stop in each phase."""
    with pytest.raises(Interrupted):
        run_step(tmp_path, corpus, 4, monkeypatch, stop_after)
    assert run_step(tmp_path, corpus, 4, monkeypatch) == uninterrupted
