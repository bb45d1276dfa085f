"""Chat templates: read, sandboxed, and rendered as transformers renders them."""

import json
import re

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.serve import name_pattern
from moray.pipelines.serve.chat_template import ArgumentText, ChatTemplate, ChatTemplateError, plain_text
from moray.pipelines.serve.name_pattern import NamePattern
from tests.pipelines.serve.chats import DIRECT, MARKS, PLAIN, REASONING, chat_vocabulary

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße 🙂\n"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"é": {}}}}}]


@pytest.fixture(scope="module")
def vocabulary():
    return chat_vocabulary()


@pytest.fixture(scope="module")
def theirs(vocabulary):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary._tokenizer, bos_token=vocabulary.label(0), eos_token=vocabulary.label(1)
    )


def template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, {"bos_token": "<bos>", "eos_token": "<eos>"})


@pytest.mark.parametrize(
    "source", [PLAIN, REASONING, DIRECT, "{%- for m in messages %}\n  {{ m.content | trim }}\n{% endfor %}"]
)
@pytest.mark.parametrize("tools", [[], TOOLS])
def test_prompts_are_those_of_transformers(source, tools, vocabulary, theirs):
    names = {"bos_token": vocabulary.label(0), "eos_token": vocabulary.label(1)}
    for generate in (True, False):
        text = ChatTemplate({"default": source}, names).render(MESSAGES, tools, add_generation_prompt=generate)
        expected = theirs.apply_chat_template(
            MESSAGES, tools=tools or None, chat_template=source, tokenize=False, add_generation_prompt=generate
        )
        assert text == expected
        vocabulary._tokenizer.encode_special_tokens = False
        ids = vocabulary._tokenizer.encode(expected, add_special_tokens=False).ids
        vocabulary._tokenizer.encode_special_tokens = True
        assert vocabulary.encode_rendered(text, "\ufdd0") == ids


def test_files_of_a_model(tmp_path):
    assert ChatTemplate.load(tmp_path, {}) is None
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}a"})
    )
    assert ChatTemplate.load(tmp_path, {"bos_token": "<b>"}).render([]) == "<s>a"
    (tmp_path / "chat_template.jinja").write_text("b")
    assert ChatTemplate.load(tmp_path, {}).render([]) == "b"


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    found = ChatTemplate.load(tmp_path, {})
    assert (found.render([]), found.render([], TOOLS), found.has_tools) == ("plain", "tools", True)


@pytest.mark.parametrize("given", [5, [], [{"name": "other", "template": "x"}], [{"name": "default"}]])
def test_a_template_that_is_none(tmp_path, given):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
    with pytest.raises(ChatTemplateError, match="must be a text, or a list"):
        ChatTemplate.load(tmp_path, {})


def test_invalid_jinja():
    with pytest.raises(ChatTemplateError, match="line 2: "):
        template("a\n{% for %}")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[9].content.x }}", "no element 9|undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "[Rr]ange"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_what_a_template_refuses_or_may_not_do(source, says):
    with pytest.raises(ChatTemplateError, match=says):
        template(source).render([{"role": "user", "content": "x"}])


def test_extensions_of_transformers():
    once = "{% generation %}{{ i }}{% endgeneration %}"
    source = "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}" + once + "{% endfor %}"
    assert template(source + "{{ strftime_now('%Y')[:2] }}").render([]) == "120"


def test_arguments_are_text_or_json():
    call = {"arguments": ArgumentText('{"a": "é"}')}
    assert (
        template("{{ messages[0].arguments }} {{ messages[0].arguments | tojson }}").render([call])
        == '{"a": "é"} {"a": "é"}'
    )


@given(texts=st.lists(st.text(), max_size=3), spelled=st.sampled_from([*MARKS, "<|bos|>"]))
def test_what_a_message_spells_is_plain_text(texts, spelled):
    """Named after a common hole: a user who writes a control token ends their turn and begins the assistant's."""
    vocabulary = chat_vocabulary()
    messages = [{"role": "user", "content": spelled.join(["", *texts, ""]).encode("utf-8", "replace").decode()}]
    marked, mark = plain_text(messages, vocabulary.control_names)
    ids = vocabulary.encode_rendered(marked[0]["content"], mark)
    assert not set(ids) & set(vocabulary.control_tokens.values())
    assert b"".join(map(vocabulary.piece, ids)).decode() == messages[0]["content"]


def test_names_are_found_as_by_an_alternation_in_any_window(monkeypatch):
    monkeypatch.setattr(name_pattern, "_WINDOW", 3)
    names = ["<|a|>", "<|a|>b", "<|ab|>", "<", "<|", "é\n", "<|a"]
    expression = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    pattern = NamePattern(names)

    @given(st.lists(st.sampled_from([*names, "a", "|", ">", "é"]), max_size=12).map("".join))
    def holds(text):
        pieces = list(pattern.pieces(text))
        assert "".join(piece for piece, _ in pieces) == text
        assert [piece for piece, named in pieces if named] == expression.findall(text)

    holds()
    assert list(NamePattern([]).pieces("ab")) == [("ab", False)]


def test_hundreds_of_names_take_no_longer_than_one():
    """Named after a message that stopped a replica for a second: beginnings of DeepSeek-V3's 800 names."""
    names = [f"<|place holder no {n}|>" for n in range(800)]
    text = "<|place holder" * 70_000 + names[5]
    pieces = list(NamePattern(names).pieces(text))
    assert [(len(piece), named) for piece, named in pieces] == [
        (len(text) - len(names[5]), False),
        (len(names[5]), True),
    ]


def test_all_marks_taken():
    with pytest.raises(ChatTemplateError, match="noncharacters"):
        plain_text(["".join(map(chr, range(0xFDD0, 0xFDF0)))], NamePattern(["<a>"]))
