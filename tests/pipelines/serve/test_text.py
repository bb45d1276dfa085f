import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.serve.text import TextStream, Token, Vocabulary

MIXED = "a🙂b café 世界 é"


def byte_ids(vocabulary, text: str) -> list[int]:
    """The text spelled with one id per byte, so that code points are split over ids."""
    single = {piece: index for index, piece in enumerate(vocabulary.pieces) if len(piece) == 1}
    return [single[bytes([byte])] for byte in text.encode()]


def push_all(stream: TextStream, ids: list[int]) -> list[str]:
    return [stream.push(Token(index)).text for index in ids]


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_text_survives_encoding_and_decoding(vocabulary, text):
    try:
        ids = vocabulary.encode(text)
    except ValueError:  # a lone surrogate
        return
    stream = TextStream(vocabulary)
    assert "".join(push_all(stream, ids)) + stream.finish().text == text


@given(st.lists(st.integers(0, 345), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_ids_decode_as_the_tokenizer_decodes_them(vocabulary, tokenizer, ids):
    stream = TextStream(vocabulary)
    assert "".join(push_all(stream, ids)) + stream.finish().text == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_split_code_point_is_held_back_until_it_is_whole(vocabulary):
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
@settings(max_examples=300, deadline=None)
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
        Vocabulary(tokenizer, None, None)
