"""The Tokens contract: what is packed comes back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.batch_plan import BatchPlan
from moray.actors.data_worker import DataWorker
from moray.actors.mixture import Mixture
from moray.actors.token_files import FolderFiles
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
    return token_set(folder)


def token_set(folder: Path) -> TokenSet:
    return TokenSet(FolderFiles(folder.parent), folder.name)


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


@pytest.mark.parametrize("told", [True, False])
def test_a_foreign_shard_with_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path, told: bool) -> None:
    """When it is opened if its index says so, and when it is read if not."""
    write(tmp_path / "a", [[[5] * 3], [[5, 998]]])
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    assert [shard["largest"] for shard in index["shards"]] == [5, 998]
    index["vocabulary"]["size"] = 998
    index["shards"][1]["largest"] = 998 if told else 997
    (tmp_path / "a" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a/tokens-00001\.bin: token id 998 is beyond its vocabulary of 998"):
        open_token_sets(str(tmp_path))["a"].batch([0, 1])


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [[[5] * 30]])
    path = tmp_path / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="its index says"):
        token_set(tmp_path)


def test_token_sets_of_two_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[5]]])
    write(tmp_path / "b", [[[5]]], Vocabulary(tokenizer="other", size=1000, bos=0, eos=1, pad=2))
    with pytest.raises(ValueError, match="different tokenizers"):
        open_token_sets(str(tmp_path))


def test_a_token_set_of_another_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [[[5]]])
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "schema_version": 9}))
    with pytest.raises(ValueError, match="schema 9"):
        token_set(tmp_path)


def test_a_data_worker_hands_out_the_mixtures_sequences(tmp_path: Path) -> None:
    sets = {name: write(tmp_path / name, [[[i + 3] * 100 for i in range(5)]]) for name in "ab"}
    plan = BatchPlan.constant(8)
    worker = DataWorker(str(tmp_path), {}, seed=3, plan=plan)
    whole = worker.batch(2, 0, 8)
    assert whole.ids.shape == (8, LENGTH)
    np.testing.assert_array_equal(np.concatenate([worker.batch(2, 0, 3).ids, worker.batch(2, 3, 8).ids]), whole.ids)
    mixture = Mixture({name: s.sequences for name, s in sets.items()}, {}, 3, plan)
    for row, (source, number) in enumerate(zip(*mixture.batch(2), strict=True)):
        one = sets["ab"[source]].batch([int(number)])
        np.testing.assert_array_equal(whole.ids[row], one.ids[0])
        np.testing.assert_array_equal(whole.documents[row], one.documents[0])
        np.testing.assert_array_equal(whole.mask[row], one.mask[0])
