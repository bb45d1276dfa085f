"""Both encoders give the same ids, or the fast one is not used; control tokens in text are text."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.text.arrow import text_buffers
from moray.pipelines.tokenizer import encoders
from moray.pipelines.tokenizer.encoders import (
    FastEncoder,
    ReferenceEncoder,
    choose_encoder,
    encoder,
    plain_json,
    probes,
)
from moray.pipelines.tokenizer.train import EOS, TokenizerConfig, hugging_face_config, train_tokenizer
from moray.platform.core.errors import InputError
from tests.examples import examples

SENTENCES = [
    "def decode(self, s):\n    return s.strip()[1:-1]\n" * 20,
    "Im Anfang schuf Gott Himmel und Erde; 1234567 \u0432 \u043d\u0430\u0447\u0430\u043b\u0435 \u4e2d\u6587 \u3042. "
    * 20,
    "a\u1abf " * 300,  # a mark after a letter: they become one token
]
# Unicode 17 has it and no Python before 3.15 does; gigatoken takes it for a mark, tokenizers for nothing.
NEW_MARK = "\u1acf"


def make(folder: Path, **settings: object) -> Path:
    config = TokenizerConfig.model_validate({"vocab_size": 400, **settings})
    train_tokenizer(iter(SENTENCES), config).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(hugging_face_config()))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tokenizer"), fim=True)


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[FastEncoder, ReferenceEncoder]:
    return FastEncoder(plain_json(folder)), ReferenceEncoder(plain_json(folder))


characters = st.one_of(st.sampled_from(encoders._KINDS), st.characters(exclude_categories=["Cs"]))
texts = st.lists(st.lists(characters, max_size=25).map("".join), max_size=6)


@settings(max_examples=examples(150))
@given(found=texts)
def test_both_encoders_give_the_same_ids(both: tuple[FastEncoder, ReferenceEncoder], found: list[str]) -> None:
    column = pa.array(found, pa.large_string())
    ours, theirs = (one.encode(column) for one in both)
    assert np.array_equal(ours.ids, theirs.ids)
    assert np.array_equal(ours.bounds, theirs.bounds)


def test_slices_and_chunks_of_columns_are_read_where_they_begin(both: tuple[FastEncoder, ReferenceEncoder]) -> None:
    column = pa.chunked_array([pa.array(["zero", "one", "two"], pa.string()), pa.array(["three"], pa.string())])
    for part in (column, column.slice(1, 2), column.slice(3), column.slice(4), column.chunk(0).slice(2)):
        ours, theirs = (one.encode(part) for one in both)
        assert np.array_equal(ours.ids, theirs.ids)
        assert np.array_equal(ours.bounds, theirs.bounds)


def test_the_fast_encoder_is_taken_and_control_tokens_in_text_are_text(folder: Path) -> None:
    assert choose_encoder("auto", folder, [], []) == ("fast", "")
    assert choose_encoder("reference", folder, [], []) == ("reference", "")
    text = f"a{EOS}b <|fim_hole|>"
    for which in ("fast", "reference"):
        ids = encoder(which, folder).encode(pa.array([text])).ids
        assert ids.min() > 5, "the control tokens are the first six"
    assert any(EOS in probe for probe in probes(folder))


def test_characters_unknown_to_python_are_encoded_by_the_reference(folder: Path) -> None:
    fast, reference = FastEncoder(plain_json(folder)), ReferenceEncoder(plain_json(folder))
    assert unicodedata.category(NEW_MARK) == "Cn"
    column = pa.array(["before", f"a{NEW_MARK}b", "", f"{NEW_MARK}", "after"], pa.large_string())
    assert encoders.texts_with_unknown(*text_buffers(column)).tolist() == [1, 3]
    raw = fast._library.encode_batch_list([f"a{NEW_MARK}b"])[0]
    expected = reference.encode(column)
    assert raw != expected.ids[expected.bounds[1] : expected.bounds[2]].tolist(), "the libraries agree by now"
    ours = fast.encode(column)
    assert np.array_equal(ours.ids, expected.ids)
    assert np.array_equal(ours.bounds, expected.bounds)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=5))
def test_unknown_characters_are_found(found: list[str]) -> None:
    expected = [n for n, text in enumerate(found) if any(unicodedata.category(one) == "Cn" for one in text)]
    assert encoders.texts_with_unknown(*text_buffers(pa.array(found, pa.large_string()))).tolist() == expected


def test_an_unsupported_split_falls_back_with_a_reason(tmp_path: Path) -> None:
    made = make(tmp_path, pattern=r"\p{L}+|[^\p{L}]")
    which, reason = choose_encoder("auto", made, [], [])
    assert which == "reference"
    assert r"gigatoken does not support this tokenizer: Unknown pre_tokenizer Split regexes" in reason
    with pytest.raises(InputError, match=r"tokenize\.encoder: fast: gigatoken does not support"):
        choose_encoder("fast", made, [], [])


def test_the_first_difference_is_named_by_document_and_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokenizers that differ by one merge stand in for two libraries that do."""
    other = json.loads((folder / "tokenizer.json").read_text())
    dropped = other["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    fast, reference = FastEncoder(plain_json(tmp_path)), ReferenceEncoder(plain_json(folder))
    word = "".join(dropped).replace("\u0120", " ")
    said = encoders.difference(fast, reference, ["document d1", "document d2"], ["q", f"qq{word}"])
    assert said.startswith("gigatoken gives different ids for document d2 at character ")
    assert encoders.difference(fast, reference, ["document d1"], ["q"]) == ""
    renewed = FastEncoder(plain_json(folder))
    monkeypatch.setattr(encoders, "_RENEW_BYTES", 10)
    column = pa.array(SENTENCES, pa.large_string())
    assert np.array_equal(renewed.encode(column).ids, renewed.encode(column).ids), "after starting anew, too"
