"""Fill-in-the-middle: no text is lost, and only the id decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.tokenize.fim import Marks, cut, fim_marks, framed, is_chosen, rearranged
from moray.pipelines.tokenizer.encoders import Encoder, FastEncoder, ReferenceEncoder, plain_json
from moray.pipelines.tokenizer.train import FIM, TokenizerConfig, train_tokenizer
from moray.platform.core.errors import InputError

TEXTS = ["def decode(self, s):\n    return s.strip()\n" * 20, "Im Anfang schuf Gott Himmel und Erde. " * 20]
BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(iter(TEXTS), TokenizerConfig(vocab_size=300, fim=True))


@pytest.fixture(scope="module", params=[FastEncoder, ReferenceEncoder])
def encoder(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    made: Encoder = request.param(plain_json(folder))
    return made


def documents(tokenizer: Any, encoder: Encoder, names: list[str], texts: list[str], rate: float) -> list[list[int]]:
    pieces, counts = rearranged(names, pa.array(texts, pa.large_string()), rate)
    found = framed(encoder.encode(pieces), counts, BOS, EOS, fim_marks(tokenizer))
    return [part.tolist() for part in np.split(found.ids, found.bounds[1:-1])]


@given(st.text(max_size=12), st.text(max_size=60))
def test_a_cut_document_is_the_same_text(name: str, text: str) -> None:
    assert not is_chosen(name, 0.0)
    assert is_chosen(name, 1.0)
    assert "".join(cut(name, text)) == text
    assert cut(name, text) == cut(name, text)


def test_the_share_is_the_rate() -> None:
    """Within four standard deviations; benchmarks/encoding.py checks it to 0.5 % of the rate on 4,000,000 ids."""
    chosen = sum(is_chosen(f"d{i}", 0.1) for i in range(20_000))
    assert chosen == pytest.approx(2000, abs=4 * (20_000 * 0.1 * 0.9) ** 0.5)


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_prefix_suffix_middle_between_their_marks(tokenizer: Any, encoder: Encoder, texts: list[str]) -> None:
    marks = fim_marks(tokenizer)
    names = [f"d{i}" for i in range(len(texts))]
    plain = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert documents(tokenizer, encoder, names, texts, 0.0) == [[BOS, *ids, EOS] for ids in plain]
    for name, text, ids in zip(names, texts, documents(tokenizer, encoder, names, texts, 1.0), strict=True):
        assert ids[:2] == [BOS, marks.begin]
        assert ids[-1] == EOS
        assert [ids.count(mark) for mark in (marks.begin, marks.hole, marks.end, EOS)] == [1, 1, 1, 1]
        hole, end = ids.index(marks.hole), ids.index(marks.end)
        prefix, suffix, middle = (
            tokenizer.decode(part) for part in (ids[2:hole], ids[hole + 1 : end], ids[end + 1 : -1])
        )
        assert (prefix, middle, suffix) == cut(name, text)


def test_some_documents_are_rearranged_and_the_others_unchanged(tokenizer: Any, encoder: Encoder) -> None:
    """A document's tokens do not depend on the rest of its shard."""
    names, texts = [f"d{i}" for i in range(200)], [f"text number {i} of many" for i in range(200)]
    whole = documents(tokenizer, encoder, names, texts, 0.1)
    assert [FIM[0] in tokenizer.decode(ids, skip_special_tokens=False) for ids in whole] == [
        is_chosen(name, 0.1) for name in names
    ]
    alone = [documents(tokenizer, encoder, [name], [text], 0.1)[0] for name, text in zip(names, texts, strict=True)]
    assert whole == alone


def test_a_text_that_spells_a_mark_is_text(tokenizer: Any, encoder: Encoder) -> None:
    marks = fim_marks(tokenizer)
    (ids,) = documents(tokenizer, encoder, ["d"], [f"a{FIM[1]}b"], 0.0)
    assert not {marks.begin, marks.hole, marks.end} & set(ids)


def test_marks_are_special_tokens_and_required(tokenizer: Any) -> None:
    ids = tokenizer.get_vocab(with_added_tokens=True)
    assert fim_marks(tokenizer) == Marks(*(ids[name] for name in FIM))
    with pytest.raises(InputError, match=r"no FIM tokens"):
        fim_marks(train_tokenizer(iter(TEXTS), TokenizerConfig(vocab_size=300)))
