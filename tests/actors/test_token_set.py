"""The Tokens contract, and the loader's order: what is packed comes back, every sequence comes once an epoch."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.data_worker import DataWorker
from moray.actors.mixture import CYCLE, Mixture
from moray.actors.token_set import TokenSet, Vocabulary, open_token_sets, write_index, write_shard

VOCABULARY = Vocabulary(tokenizer="t", size=1000, bos=0, eos=1, pad=2)
LENGTH = 16


def write(folder: Path, shards: list[list[list[int]]], vocabulary: Vocabulary = VOCABULARY) -> TokenSet:
    made = [
        write_shard(folder, number, [(f"d{number}.{i}", ids, 2 * len(ids)) for i, ids in enumerate(docs)], LENGTH,
                    vocabulary)
        for number, docs in enumerate(shards)
    ]  # fmt: skip
    write_index(folder, made, LENGTH, vocabulary)
    return TokenSet(folder)


documents = st.lists(st.lists(st.integers(3, 999), max_size=40), max_size=6)


@settings(max_examples=40)
@given(st.lists(documents, min_size=1, max_size=3))
def test_what_is_packed_comes_back(tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[int]]]) -> None:
    tokens = write(tmp_path_factory.mktemp("tokens"), shards)
    for shard, docs in zip(tokens.shards, shards, strict=True):
        stream, table = tokens.stream(shard), tokens.documents(shard)
        back = [
            stream[start : start + count].tolist()
            for start, count in zip(table["start"].to_pylist(), table["tokens"].to_pylist(), strict=True)
        ]
        assert back == [[0, *ids, 1] for ids in docs]
    assert tokens.tokens == sum(len(ids) + 2 for docs in shards for ids in docs)
    everything = tokens.batch(range(tokens.sequences))
    assert everything.mask.sum() == tokens.tokens
    assert (everything.ids[~everything.mask] == VOCABULARY.pad).all()


def test_documents_are_numbered_within_a_sequence(tmp_path: Path) -> None:
    tokens = write(tmp_path, [[list(range(3, 13)), list(range(3, 23))]])
    batch = tokens.batch([0, 1, 2])
    assert batch.documents[0].tolist() == [0] * 12 + [1] * 4
    assert batch.documents[1].tolist() == [0] * 16, "a sequence that begins inside a document begins with number 0"
    assert batch.mask[2].sum() == 34 - 32


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    large = Vocabulary(tokenizer="t", size=70_000, bos=0, eos=1, pad=2)
    tokens = write(tmp_path, [[[69_999, 3]]], large)
    assert tokens.batch([0]).ids[0, :4].tolist() == [0, 69_999, 3, 1]
    assert (tmp_path / "tokens-00000.bin").stat().st_size == 4 * LENGTH


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"d0\.0: token ids 5\.\.1000 outside 0\.\.999"):
        write(tmp_path, [[[5, 1000]]])


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [[[5] * 30]])
    path = tmp_path / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="its index says"):
        TokenSet(tmp_path)


def test_token_sets_of_two_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[5]]])
    write(tmp_path / "b", [[[5]]], Vocabulary(tokenizer="other", size=1000, bos=0, eos=1, pad=2))
    with pytest.raises(ValueError, match="different tokenizers"):
        open_token_sets(tmp_path)


def test_a_token_set_of_another_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [[[5]]])
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "schema_version": 9}))
    with pytest.raises(ValueError, match="schema 9"):
        TokenSet(tmp_path)


sizes = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 50), min_size=1)


@settings(max_examples=60)
@given(sizes, st.integers(0, 9), st.integers(1, 40), st.integers(0, 30))
def test_a_batch_does_not_depend_on_who_asks(sizes: dict[str, int], seed: int, size: int, step: int) -> None:
    mixture = Mixture(sizes, {}, seed)
    whole = mixture.batch(step, size)
    for ranks in (1, 2, 3, 4, 8):
        bounds = [size * rank // ranks for rank in range(ranks + 1)]
        parts = [Mixture(sizes, {}, seed).batch(step, size, a, b) for a, b in itertools.pairwise(bounds)]
        assert [slot for part in parts for slot in part] == whole


@settings(max_examples=30)
@given(sizes, st.integers(0, 9))
def test_every_sequence_comes_once_an_epoch(sizes: dict[str, int], seed: int) -> None:
    mixture = Mixture(sizes, {}, seed)
    drawn: dict[int, list[int]] = {}
    for position in range(2 * CYCLE):
        source, number = mixture.slot(position)
        drawn.setdefault(source, []).append(number)
    for source, numbers in drawn.items():
        count = sizes[mixture.sources[source]]
        for start in range(0, len(numbers) - count + 1, count):
            assert sorted(numbers[start : start + count]) == list(range(count))


@settings(max_examples=60)
@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5), st.integers(0, 3 * CYCLE), st.integers(8, 64))
def test_any_batch_holds_each_sources_share(weights: list[float], step: int, size: int) -> None:
    names = "abcde"[: len(weights)]
    mixture = Mixture(dict.fromkeys(names, 10), dict(zip(names, weights, strict=True)), seed=1)
    found = Counter(source for source, _ in mixture.batch(step, size))
    for source, weight in enumerate(weights):
        assert abs(found[source] - size * weight / sum(weights)) < 2.1


def test_epochs_are_shuffled_differently() -> None:
    mixture = Mixture({"a": 30}, {}, seed=1)
    first, second = ([mixture.slot(e * 30 + i)[1] for i in range(30)] for e in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"z": 1.0}, "the sources are a, b"), ({"a": -1.0}, "negative"), ({"a": 0.0}, "at least one")],
)
def test_an_impossible_mixture_is_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture({"a": 3, "b": 3}, weights, seed=1)


def test_a_data_worker_hands_out_the_mixtures_sequences(tmp_path: Path) -> None:
    sets = {name: write(tmp_path / name, [[[i + 3] * 100 for i in range(5)]]) for name in "ab"}
    worker = DataWorker(str(tmp_path), {}, seed=3, batch_sequences=8)
    whole = worker.batch(2, 0, 8)
    assert whole.ids.shape == (8, LENGTH)
    np.testing.assert_array_equal(np.concatenate([worker.batch(2, 0, 3).ids, worker.batch(2, 3, 8).ids]), whole.ids)
    mixture = Mixture({name: s.sequences for name, s in sets.items()}, {}, 3)
    source, number = mixture.batch(2, 8)[5]
    np.testing.assert_array_equal(whole.ids[5], sets["ab"[source]].batch([number]).ids[0])
