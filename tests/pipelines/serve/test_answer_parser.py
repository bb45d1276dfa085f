"""Reading answers as they come: the same pieces however a text is cut."""

# ruff: noqa: RUF001
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.serve.answer_parser import AnswerParser, Piece
from moray.pipelines.serve.tool_format import format_of
from tests.pipelines.serve.chats import DIRECT, PLAIN, REASONING

FORMATS = {"hermes": format_of(PLAIN), "fenced": format_of(REASONING), "direct": format_of(DIRECT)}
ARGUMENTS = [
    "{}",
    '{"a": 1}',
    '{"city": "Z}\\"{", "list": [{"deep": {}}]}',
    '{"text": "</tool_call><｜tool▁call▁end｜> \\\\"}',
]


def read(parser: AnswerParser, text: str, cuts=()) -> list[Piece]:
    ends = [*sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    pieces, begin = [], 0
    for end in ends:
        pieces += parser.feed(text[begin:end])
        begin = end
    return joined([*pieces, *parser.feed("", last=True)])


def joined(pieces) -> list[Piece]:
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].kind == piece.kind != "call":
            found[-1] = Piece(piece.kind, found[-1].text + piece.text)
        else:
            found.append(piece)
    return found


def written(form, content: str, calls) -> str:
    text = form.between.join(f"{form.call}{name}{form.middle}{arguments}{form.close}" for name, arguments in calls)
    return f"{content}{form.opening}{text}{form.end}"


@pytest.mark.parametrize("name", FORMATS)
@given(
    content=st.text("ab<\n｜tool_call>", max_size=12),
    calls=st.lists(
        st.tuples(st.sampled_from(["f", "get_weather"]), st.sampled_from(ARGUMENTS)), min_size=1, max_size=3
    ),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_calls_are_found_however_the_text_is_cut(name, content, calls, cuts):
    form = FORMATS[name]
    if form.opening in content:
        return
    expected = [Piece("content", content)] if content else []
    for function, arguments in calls:
        expected += [Piece("call", function), Piece("arguments", arguments)]
    parser = AnswerParser(form)
    assert read(parser, written(form, content, calls), cuts) == expected
    assert parser.calls == len(calls)


@given(text=st.text("<think>/ab\n", max_size=40), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_reasoning_is_split_the_same_however_the_text_is_cut(text, cuts):
    for reasoning in (False, True):
        whole = read(AnswerParser(None, True, reasoning), text)
        assert read(AnswerParser(None, True, reasoning), text, cuts) == whole


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("a</think>\n\nb", True, [Piece("reasoning", "a"), Piece("content", "b")]),
        ("<think>a</think>b", False, [Piece("reasoning", "a"), Piece("content", "b")]),
        ("\n<think>a", False, [Piece("reasoning", "a")]),
        ("a<think>b", False, [Piece("content", "a<think>b")]),
        ("a</thi", True, [Piece("reasoning", "a</thi")]),
        ("<thi", False, [Piece("content", "<thi")]),
        ("", True, []),
    ],
)
def test_reasoning(text, inside, expected):
    assert read(AnswerParser(None, True, inside), text) == expected


def test_what_may_begin_a_mark_is_held_back():
    parser = AnswerParser(FORMATS["hermes"])
    assert parser.feed("yes <tool") == [Piece("content", "yes ")]
    assert parser.feed("s>") == [Piece("content", "<tools>")]


def test_an_answer_that_ends_inside_of_a_call():
    form = FORMATS["hermes"]
    text = written(form, "", [("f", '{"a": 1}')])
    parser = AnswerParser(form)
    assert read(parser, text[: text.index("1}") + 1]) == [Piece("call", "f"), Piece("arguments", '{"a": 1')]
    assert read(AnswerParser(form), '<tool_call>\n{"na') == []


def test_formats_are_those_of_the_templates():
    assert format_of("{{ messages }}") is None
    assert {name: form.middle for name, form in FORMATS.items()} == {
        "hermes": '", "arguments": ',
        "fenced": "\n```json\n",
        "direct": "<｜tool▁sep｜>",
    }
