"""The text steps' own rules: split, tokenizer, documents. Ray is not needed for any of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.evaluate.baselines import ByteCounts, ByteModel, UnigramModel
from moray.pipelines.shared.documents import document_id, shard_paths, write_shard
from moray.pipelines.split import SplitConfig, is_heldout
from moray.pipelines.tokenizer.train import TokenizerConfig, train_tokenizer
from tests.examples import examples

WORDS = [f"word{i}" for i in range(400)]


def test_ids_depend_on_source_and_key_and_on_nothing_else() -> None:
    assert document_id("a", "bc") == document_id("a", "bc")
    assert len({document_id("a", "bc"), document_id("ab", "c"), document_id("a", "b")}) == 3
    assert len(document_id("a", "b")) == 32


def test_a_shard_that_breaks_the_contract_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column 'text' must be large_string"):
        write_shard(tmp_path / "documents-00000.parquet", pa.table({"id": ["a"], "text": ["b"]}))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="holds no documents"):
        shard_paths(tmp_path)


def test_the_split_depends_on_the_id_alone_and_has_its_share() -> None:
    ids = [document_id("s", str(i)) for i in range(20_000)]
    share = sum(is_heldout(name, SplitConfig(heldout=0.05)) for name in ids) / len(ids)
    assert share == pytest.approx(0.05, abs=0.006)  # four standard deviations of a fair draw
    salted = SplitConfig(heldout=0.05, salt="x")
    assert any(is_heldout(i, salted) != is_heldout(i, SplitConfig(heldout=0.05)) for i in ids)


TEXTS = [f"The number {i} is {'odd' if i % 2 else 'even'}; its square is {i * i}.\n" for i in range(800)]


@settings(max_examples=examples(50))
@given(st.text(max_size=60))
def test_any_text_round_trips(text: str) -> None:
    tokenizer = ROUND_TRIP
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_training_the_tokenizer_twice_gives_the_same() -> None:
    one, other = (train_tokenizer(iter(TEXTS), TokenizerConfig(vocab_size=420)).to_str() for _ in range(2))
    assert one == other
    assert [json.loads(one)["model"]["vocab"][t] for t in ("<|bos|>", "<|eos|>", "<|pad|>")] == [0, 1, 2]


ROUND_TRIP = train_tokenizer(iter(TEXTS), TokenizerConfig(vocab_size=420))


def test_the_byte_model_equals_its_definition() -> None:
    """Against a dictionary implementation of the same formula, one byte at a time."""
    corpus, text = [b"abracadabra", b"abba", b"cab"], b"abracab!"
    counts = ByteCounts()
    for document in corpus:
        counts.add(document)
    seen: dict[bytes, dict[int, int]] = {}
    for document in corpus:
        padded = b"\0\0" + document
        for i in range(2, len(padded)):
            for order in range(3):
                row = seen.setdefault(padded[i - order : i], {})
                row[padded[i]] = row.get(padded[i], 0) + 1
    bits, padded = 0.0, b"\0\0" + text
    for i in range(2, len(padded)):
        p = 1 / 256
        for order in range(3):
            row = seen.get(padded[i - order : i], {})
            if row:
                p = (row.get(padded[i], 0) + len(row) * p) / (sum(row.values()) + len(row))
        bits -= np.log2(p)
    assert ByteModel(counts).bits(text) == pytest.approx(bits, rel=1e-12)


def test_the_unigram_model_is_a_distribution() -> None:
    model = UnigramModel(5)
    model.add(np.array([1, 1, 3]))
    assert sum(2 ** -model.bits(np.array([i])) for i in range(5)) == pytest.approx(1.0)
    assert model.bits(np.array([1])) == pytest.approx(-np.log2(3 / 8))
