"""The Tokens contract: packed documents are read back unchanged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.actors.data.batch_plan import BatchPlan
from moray.actors.data.data_worker import DataWorker
from moray.actors.data.mixture import Mixture
from moray.actors.data.token_files import FolderFiles
from moray.actors.data.token_set import TokenSet, TokenVocabulary, open_token_sets, write_index, write_token_shard
from moray.pipelines.tokenize.sequence_packing import Packing, TokenDocuments, pack_documents, plan_sequences
from tests.examples import examples

VOCABULARY = TokenVocabulary(tokenizer="t", size=1000, bos=0, eos=1, pad=2)
LENGTH = 16


def documents_of(docs: list[list[int]], number: int = 0, vocabulary: TokenVocabulary = VOCABULARY) -> TokenDocuments:
    """Documents d0.0, d0.1, ... of these ids, with bos and eos; two bytes per id."""
    tokens = [[vocabulary.bos, *ids, vocabulary.eos] for ids in docs]
    return TokenDocuments(
        [f"d{number}.{i}" for i in range(len(docs))],
        np.array([2 * len(ids) for ids in docs], np.int64),
        np.array([token for ids in tokens for token in ids], np.uint32),
        np.cumsum([0, *map(len, tokens)]),
    )


def write(
    folder: Path,
    shards: list[list[list[int]]],
    vocabulary: TokenVocabulary = VOCABULARY,
    packing: Packing = "concatenate",
) -> TokenSet:
    made = []
    for number, docs in enumerate(shards):
        documents = documents_of(docs, number, vocabulary)
        pieces = plan_sequences(np.diff(documents.bounds), LENGTH, packing)
        made.append(write_token_shard(folder, number, *pack_documents(documents, pieces, LENGTH, vocabulary)))
    write_index(folder, made, LENGTH, vocabulary)
    return token_set(folder)


def token_set(folder: Path) -> TokenSet:
    return TokenSet(FolderFiles(folder.parent), folder.name)


documents = st.lists(st.lists(st.integers(3, 999), max_size=40), max_size=6)


@pytest.mark.parametrize("packing", ["best-fit", "concatenate"])
@settings(max_examples=examples(40))
@given(shards=st.lists(documents, min_size=1, max_size=3))
def test_packed_documents_are_read_back(
    packing: Packing, tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[int]]]
) -> None:
    tokens = write(tmp_path_factory.mktemp("tokens"), shards, packing=packing)
    for shard, docs in zip(tokens.shards, shards, strict=True):
        back = {name: (ids.tolist(), size) for name, ids, size in tokens.documents(shard)}
        assert back == {f"d{shard.number}.{i}": ([0, *ids, 1], 2 * len(ids)) for i, ids in enumerate(docs)}
        assert (shard.documents, shard.bytes) == (len(docs), sum(2 * len(ids) for ids in docs))
    assert tokens.tokens == sum(len(ids) + 2 for docs in shards for ids in docs)
    everything = tokens.batch(range(tokens.sequences))
    assert everything.mask.sum() == tokens.tokens
    assert (everything.ids[~everything.mask] == VOCABULARY.pad).all()


@pytest.mark.parametrize("packing", ["best-fit", "concatenate"])
@settings(max_examples=examples(40))
@given(docs=documents)
def test_tokens_have_one_number_exactly_if_they_are_of_one_document(
    packing: Packing, tmp_path_factory: pytest.TempPathFactory, docs: list[list[int]]
) -> None:
    """In each sequence, for any pieces, because attention and loss do not cross these numbers."""
    tokens = write(tmp_path_factory.mktemp("tokens"), [docs], packing=packing)
    batch = tokens.batch(range(tokens.sequences))
    owners = np.full(batch.ids.size, -1)
    for n, row in enumerate(tokens.pieces(tokens.shards[0]).to_pylist()):
        owners[row["start"] : row["start"] + row["tokens"]] = n
    for own, numbers, mask in zip(owners.reshape(batch.ids.shape), batch.documents, batch.mask, strict=True):
        assert ((own >= 0) == mask).all()
        assert ((np.diff(own[mask]) != 0) == (np.diff(numbers[mask]) == 1)).all()


def test_documents_are_numbered_within_a_sequence(tmp_path: Path) -> None:
    tokens = write(tmp_path, [[list(range(3, 13)), list(range(3, 23))]])
    batch = tokens.batch([0, 1, 2])
    assert batch.documents[0].tolist() == [0] * 12 + [1] * 4
    assert batch.documents[1].tolist() == [0] * 16, "a sequence that begins inside a document begins with number 0"
    assert batch.mask[2].sum() == 34 - 32


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    large = TokenVocabulary(tokenizer="t", size=70_000, bos=0, eos=1, pad=2)
    tokens = write(tmp_path, [[[69_999, 3]]], large)
    assert tokens.batch([0]).ids[0, :4].tolist() == [0, 69_999, 3, 1]
    assert (tmp_path / "tokens-00000.bin").stat().st_size == 4 * LENGTH


def test_special_ids_must_be_three() -> None:
    with pytest.raises(ValueError, match="bos 0, eos 1 and pad 1 must be three different tokens"):
        TokenVocabulary(tokenizer="t", size=1000, bos=0, eos=1, pad=1)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"d0\.0: token ids 0\.\.1000 outside 0\.\.999"):
        write(tmp_path, [[[5, 1000]]])


@pytest.mark.parametrize("recorded", [True, False])
def test_a_shard_with_an_id_outside_the_vocabulary_is_refused(tmp_path: Path, recorded: bool) -> None:
    """On opening if the index records the id, else on reading."""
    write(tmp_path / "a", [[[5] * 3], [[5, 998]]])
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    assert [shard["largest"] for shard in index["shards"]] == [5, 998]
    index["vocabulary"]["size"] = 998
    index["shards"][1]["largest"] = 998 if recorded else 997
    (tmp_path / "a" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a/tokens-00001\.bin: token id 998 is outside the vocabulary of 998"):
        open_token_sets(str(tmp_path))["a"].batch([0, 1])


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [[[5] * 30]])
    path = tmp_path / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="its index requires"):
        token_set(tmp_path)


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    tokens = write(tmp_path, [[[5] * 30]])
    path = tmp_path / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"tokens-00000\.bin ends before its index says"):
        tokens.batch([0, 1])


def test_few_files_are_open_however_many_there_are(tmp_path: Path) -> None:
    """Named after a run that died at the limit on descriptors: each file it had read stayed open."""
    tokens = write(tmp_path, [[[number + 3] * 5] for number in range(300)])
    assert tokens.batch(range(300)).ids[:, 1].tolist() == [number + 3 for number in range(300)]
    links = list(Path("/proc/self/fd").iterdir())
    assert sum(str(tmp_path) in os.path.realpath(link) for link in links) <= 256


def test_token_sets_of_two_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[5]]])
    write(tmp_path / "b", [[[5]]], TokenVocabulary(tokenizer="other", size=1000, bos=0, eos=1, pad=2))
    with pytest.raises(ValueError, match="different tokenizers"):
        open_token_sets(str(tmp_path))


def test_a_token_set_of_another_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [[[5]]])
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "schema_version": 9}))
    with pytest.raises(ValueError, match="schema version 9; only version 3 is supported"):
        token_set(tmp_path)


def test_a_data_worker_serves_the_mixtures_sequences(tmp_path: Path) -> None:
    sets = {name: write(tmp_path / name, [[[i + 3] * 100 for i in range(5)]]) for name in "ab"}
    plan = BatchPlan.constant(8)
    worker = DataWorker(str(tmp_path), {}, seed=3, plan=plan)
    stored = worker.batch(2, 0, 8)
    assert stored.ids.dtype == VOCABULARY.dtype, "two bytes a token are sent"
    whole = stored.unpacked()
    assert all(array.flags.c_contiguous for array in (whole.ids, whole.documents, whole.mask)), "torch takes no others"
    assert whole.ids.shape == (8, LENGTH)
    np.testing.assert_array_equal(np.concatenate([worker.batch(2, 0, 3).ids, worker.batch(2, 3, 8).ids]), whole.ids)
    mixture = Mixture({name: s.sequences for name, s in sets.items()}, {}, 3, plan)
    for row, (source, number) in enumerate(zip(*mixture.batch(2), strict=True)):
        one = sets["ab"[source]].batch([int(number)])
        np.testing.assert_array_equal(whole.ids[row], one.ids[0])
        np.testing.assert_array_equal(whole.documents[row], one.documents[0])
        np.testing.assert_array_equal(whole.mask[row], one.mask[0])
