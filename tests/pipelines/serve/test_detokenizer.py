import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.serve.detokenizer import ServingVocabulary, TextStream, Token
from tests.examples import examples

MIXED = "a🙂b café 世界 é"


def byte_ids(vocabulary, text: str) -> list[int]:
    """The text spelled with one id per byte, so that code points are split over ids."""
    single = {piece: index for index, piece in enumerate(vocabulary.pieces) if len(piece) == 1}
    return [single[bytes([byte])] for byte in text.encode()]


def push_all(stream: TextStream, ids: list[int]) -> list[str]:
    return [stream.push(Token(index)).text for index in ids]


@given(st.text())
@settings(max_examples=examples(100), deadline=None)
def test_text_survives_encoding_and_decoding(vocabulary, text):
    try:
        ids = vocabulary.encode(text)
    except ValueError:  # a lone surrogate
        return
    stream = TextStream(vocabulary)
    assert "".join(push_all(stream, ids)) + stream.finish().text == text


@given(st.lists(st.integers(0, 345), max_size=30))
@settings(max_examples=examples(200), deadline=None)
def test_any_ids_decode_as_the_tokenizer_decodes_them(vocabulary, tokenizer, ids):
    stream = TextStream(vocabulary)
    assert "".join(push_all(stream, ids)) + stream.finish().text == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_split_code_point_is_held_back_until_it_is_complete(vocabulary):
    stream = TextStream(vocabulary)
    assert push_all(stream, byte_ids(vocabulary, "🙂!")) == ["", "", "", "🙂", "!"]


def test_a_code_point_that_never_ends_shows_as_a_replacement(vocabulary):
    stream = TextStream(vocabulary)
    push_all(stream, byte_ids(vocabulary, "ab🙂")[:-1])
    assert stream.finish().text == "�"


def test_text_that_spells_a_special_token_is_plain_text(vocabulary):
    assert vocabulary.eos not in vocabulary.encode("<|eos|>")
    assert vocabulary.label(vocabulary.eos) == "<|eos|>"
    assert vocabulary.piece(vocabulary.eos) == b""


def test_a_lone_surrogate_is_refused(vocabulary):
    with pytest.raises(ValueError, match="surrogate"):
        vocabulary.encode("a\ud800")


def test_a_stop_string_over_several_ids_ends_the_text_before_it(vocabulary):
    stream = TextStream(vocabulary, ("STOP",))
    shown = push_all(stream, byte_ids(vocabulary, "xSTxSTOP"))
    assert shown == ["x", "", "", "STx", "", "", "", ""]
    assert stream.stopped


def test_of_two_stop_strings_the_one_complete_first_counts(vocabulary):
    stream = TextStream(vocabulary, ("bcd", "c"))
    assert push_all(stream, byte_ids(vocabulary, "abc")) == ["a", "", "b"]
    assert stream.stopped


def test_the_start_of_a_stop_string_is_shown_when_the_answer_ends(vocabulary):
    stream = TextStream(vocabulary, ("STOP",))
    assert push_all(stream, byte_ids(vocabulary, "aST")) == ["a", "", ""]
    last = stream.finish()
    assert last.text == "ST"
    assert [token.offset for token in last.tokens] == [1, 2]
    assert not stream.stopped


@given(st.text(alphabet="ab🙂", max_size=12), st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=4), max_size=3))
@settings(max_examples=examples(300), deadline=None)
def test_streaming_with_stops_equals_searching_the_text_as_it_grows(vocabulary, text, stops):
    stream = TextStream(vocabulary, tuple(stops))
    shown = ""
    for index in byte_ids(vocabulary, text):
        shown += stream.push(Token(index)).text
        if stream.stopped:
            break
    else:
        shown += stream.finish().text
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if ends:
        grown = text[: ends[0]]
        text = grown[: min(grown.find(stop) for stop in stops if stop in grown)]
    assert (shown, stream.stopped) == (text, bool(ends))


def test_released_tokens_are_those_of_the_released_text(vocabulary):
    stream = TextStream(vocabulary, ("b!",))
    released = [stream.push(Token(index)) for index in byte_ids(vocabulary, "aéb!")]
    assert [[token.offset for token in part.tokens] for part in released] == [[0], [], [1, 1], [], []]
    assert "".join(part.text for part in released) == "aé"


def test_the_echoed_prompt_does_not_stop_the_answer(vocabulary):
    stream = TextStream(vocabulary, ("stop",))
    prompt = [Token(index) for index in byte_ids(vocabulary, "stop")]
    assert stream.echo(prompt).text == "stop"
    assert not stream.stopped


def test_a_tokenizer_of_another_kind_is_refused():
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="byte-level"):
        ServingVocabulary(tokenizer, None, None)


def gapped() -> Any:
    """A byte-level tokenizer of 256 bytes and an end, whose id leaves a gap."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab={**vocabulary, "<|end|>": 300}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    return made


def test_ids_are_measured_and_not_counted() -> None:
    """A tokenizer with 257 tokens and ids up to 300 has 301 rows: its end is one of them."""
    made = ServingVocabulary(gapped(), None, 300)
    assert len(made.pieces) == 301
    assert made.label(300) == "<|end|>"
    assert (made.label(280), made.piece(280)) == ("token_id:280", b"")


def test_truncation_and_padding_of_the_file_change_no_prompt(tmp_path: Path) -> None:
    """As transformers reads the file; a fine-tune leaves them there."""
    tokenizer = gapped()
    plain = tokenizer.encode("hello world").ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64, pad_id=2, pad_token="x")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert ServingVocabulary.load(tmp_path, None, 300).encode("hello world") == plain
    assert ServingVocabulary(tokenizer, None, 300).encode("hello world") == plain


def test_two_ids_with_one_text_have_two_names() -> None:
    tokenizer = gapped()
    first = tokenizer.token_to_id("\u0120")  # a space, as byte-level vocabularies spell it
    tokenizer.add_tokens([" "])
    twin = tokenizer.get_vocab()[" "]
    other = ServingVocabulary(tokenizer, None, 300)
    assert other.piece(first) == other.piece(twin) == b" "
    assert {other.label(first), other.label(twin)} == {" ", f"token_id:{max(first, twin)}"}
    assert len({other.label(index) for index in range(310)}) == 310


@pytest.mark.parametrize(
    ("content", "ends"), [({"eos_token_id": [1, 5]}, {1, 5}), ({"eos_token_id": 5}, {5}), ({}, {300})]
)
def test_generation_config_names_the_ends(tmp_path: Path, content: dict[str, Any], ends: set[int]) -> None:
    gapped().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert ServingVocabulary.load(tmp_path, None, 300).ends == ends


@pytest.mark.parametrize("content", ['{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}', "[1]", "{"])
def test_a_generation_config_that_cannot_be_honoured(tmp_path: Path, content: str) -> None:
    gapped().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        ServingVocabulary.load(tmp_path, None, 300)


def test_a_text_that_begins_with_bos_begins_with_it_once(vocabulary) -> None:
    """As lm-evaluation-harness sends it; anywhere else it is plain characters."""
    plain = vocabulary.encode("In the")
    assert vocabulary.encode("<|bos|>In the") == [vocabulary.bos, *plain]
    assert vocabulary.encode("<|bos|>") == [vocabulary.bos]
    assert vocabulary.bos not in vocabulary.encode(" <|bos|>In the")
    assert vocabulary.encode("<|bos|><|bos|>").count(vocabulary.bos) == 1
