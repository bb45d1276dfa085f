"""Documents whose middle comes last: nothing is lost, and the id alone decides."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.fim import Marks, cut, encode_middles_last, fim_marks
from moray.pipelines.tokenizer import FIM, TokenizerConfig, train
from moray.platform.errors import InputError

TEXTS = ["def decode(self, s):\n    return s.strip()\n" * 20, "Im Anfang schuf Gott Himmel und Erde. " * 20]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train(iter(TEXTS), TokenizerConfig(vocab_size=300, fim=True))


@given(st.text(max_size=12), st.text(max_size=60))
def test_a_cut_document_is_the_same_text(name: str, text: str) -> None:
    assert cut(name, text, 0.0) is None
    parts = cut(name, text, 1.0)
    assert parts is not None
    assert "".join(parts) == text
    assert cut(name, text, 1.0) == parts


def test_the_share_is_the_rate() -> None:
    chosen = sum(cut(f"d{i}", "some text", 0.1) is not None for i in range(20_000))
    assert chosen == pytest.approx(2000, abs=4 * (20_000 * 0.1 * 0.9) ** 0.5)


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_prefix_suffix_middle_between_their_marks(tokenizer: Any, texts: list[str]) -> None:
    marks = fim_marks(tokenizer)
    names = [f"d{i}" for i in range(len(texts))]
    plain = encode_middles_last(tokenizer, marks, names, texts, 0.0)
    assert plain == [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    for name, text, ids in zip(names, texts, encode_middles_last(tokenizer, marks, names, texts, 1.0), strict=True):
        assert ids[0] == marks.begin
        hole, end = ids.index(marks.hole), ids.index(marks.end)
        prefix, suffix, middle = (tokenizer.decode(part) for part in (ids[1:hole], ids[hole + 1 : end], ids[end + 1 :]))
        assert (prefix, middle, suffix) == cut(name, text, 1.0)


def test_marks_are_special_tokens_and_need_to_be_there(tokenizer: Any) -> None:
    ids = tokenizer.get_vocab(with_added_tokens=True)
    assert fim_marks(tokenizer) == Marks(*(ids[name] for name in FIM))
    with pytest.raises(InputError, match=r"no tokens for it"):
        fim_marks(train(iter(TEXTS), TokenizerConfig(vocab_size=300)))
