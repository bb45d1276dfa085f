"""Grammars: what they let through, what they refuse, and that every walk through one is valid."""

import json
import random
import re

import jsonschema
import pytest
import torch

from moray.pipelines.serve.grammar import GrammarCompiler, GrammarError, of_choice, of_grammar, of_regex, of_schema
from moray.pipelines.serve.json_schema import bounded_numbers
from tests.pipelines.serve.chats import chat_vocabulary

SCHEMAS = {
    "record": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "maxItems": 3},
            "score": {"type": "number"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "nested": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"n": {"type": "integer"}},
                "required": ["n"],
                "additionalProperties": False,
            }
        },
        "type": "array",
        "items": {"$ref": "#/$defs/node"},
        "minItems": 1,
        "maxItems": 2,
    },
    "either": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
    "date": {"type": "string", "format": "date"},
}


@pytest.fixture(scope="module")
def vocabulary():
    return chat_vocabulary()


@pytest.fixture(scope="module")
def compiler(vocabulary):
    return GrammarCompiler(vocabulary)


def walk(vocabulary, grammar, seed: int, most: int = 400) -> tuple[str, bool]:
    """A random answer, and whether it is complete."""
    state, chance, ids = grammar.start(), random.Random(seed), []
    while not state.ended and len(ids) < most:
        logits_V = torch.zeros(len(vocabulary.pieces))
        state.mask(logits_V)
        ids.append(chance.choice(logits_V.isfinite().nonzero().flatten().tolist()))
        state.accept(ids[-1])
    return b"".join(map(vocabulary.piece, ids)).decode("utf-8", "replace"), state.ended


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_finished_walk_is_valid(vocabulary, compiler, name):
    grammar = compiler.compile(of_schema(SCHEMAS[name]))
    finished = 0
    for seed in range(40):
        text, ended = walk(vocabulary, grammar, seed)
        finished += ended
        if ended:
            jsonschema.validate(json.loads(text), SCHEMAS[name])
    assert finished >= 38


def test_an_unfinished_walk_is_the_beginning_of_an_answer(vocabulary, compiler):
    grammar = compiler.compile(of_schema({"type": "string"}))
    text, ended = walk(vocabulary, grammar, 3, most=5)
    assert not ended
    state = grammar.start()
    for index in vocabulary.encode(text + '"'):
        state.accept(index)
    assert state.ended


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (of_regex(r"[ab]{3}/\d"), r"[ab]{3}/\d"),
        (of_choice(("yes", 'no "or" <[1]>', "ja\n")), r'yes|no "or" <\[1\]>|ja\n'),
        (of_grammar('start: "a" number\nnumber: /[0-9]{2}/'), r"a[0-9]{2}"),
        (of_grammar('root ::= "x" [0-9] "y"'), r"x[0-9]y"),
    ],
)
def test_other_forms(vocabulary, compiler, text, pattern):
    grammar = compiler.compile(text)
    for seed in range(10):
        answer, ended = walk(vocabulary, grammar, seed)
        assert ended
        assert re.fullmatch(pattern, answer)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {}, "then": {}, "type": "string"}, "if, then"),
        ({"type": "objct"}, "objct"),
        ({"type": "string", "format": "crontab"}, "crontab"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "http://localhost:1/schema.json"}, "localhost:1"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength|maxLength|[Uu]nsatisfiable"),
    ],
)
def test_what_cannot_be_done_is_named(compiler, schema, says):
    with pytest.raises(GrammarError, match=says) as raised:
        compiler.compile(of_schema(schema))
    assert "\n" not in str(raised.value)


def test_grammars_that_are_none(compiler):
    for text in (of_regex("(a"), of_grammar('start: "a" | missing')):
        with pytest.raises(GrammarError, match=r"unclosed|missing"):
            compiler.compile(text)
    for source in ("start", "root ::= missing", "", "rule: 'a'"):
        with pytest.raises(GrammarError):
            compiler.compile(of_grammar(source))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(([a-z]+)+)+x{1000}{1000}$"},
        {"type": "string", "minLength": 10**9},
        {"enum": [f"value {number}" for number in range(20_000)]},
        {"type": "array", "minItems": 10**9},
        {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"p{a}{b}": {}}} for a in range(12)]} for b in range(12)
            ]
        },
        {"type": "string", "pattern": "(a|b|ab)*c" * 50},
    ],
)
def test_hostile_schemas_end_in_bounded_time_and_memory(vocabulary, compiler, schema):
    """No time is asserted: what is unbounded does not come back."""
    try:
        grammar = compiler.compile(of_schema(schema))
        walk(vocabulary, grammar, 1, most=30)
    except GrammarError:
        pass


def test_a_compiled_grammar_is_kept(compiler):
    assert compiler.compile(of_schema({"const": 1})) is compiler.compile(of_schema({"const": 1}))


def test_several_ends_or_none(vocabulary):
    from moray.pipelines.serve.detokenizer import ServingVocabulary

    for ends in ([1, 2], []):
        other = ServingVocabulary(vocabulary._tokenizer, 0, None, ends)
        state = GrammarCompiler(other).compile(of_regex("a+")).start()
        state.accept(other.encode("a")[0])
        logits_V = torch.zeros(len(other.pieces))
        state.mask(logits_V)
        assert logits_V[[0, 1, 2]].isfinite().tolist() == [False, bool(ends), bool(ends)]


def test_numbers_get_limits_where_they_have_none():
    largest = 2**53 - 1
    limits = {"minimum": -largest, "maximum": largest}
    schema = {
        "properties": {"type": {"type": "integer"}, "minimum": {"type": "number", "maximum": 3}},
        "items": [{"type": ["integer", "null"]}, True],
        "$defs": {"a": {"anyOf": [{"type": "number"}]}},
        "additionalProperties": {"type": "integer", "enum": [1]},
        "default": {"type": "integer"},
    }
    assert bounded_numbers(schema) == {
        "properties": {"type": {"type": "integer", **limits}, "minimum": {"type": "number", "maximum": 3}},
        "items": [{"type": ["integer", "null"], **limits}, True],
        "$defs": {"a": {"anyOf": [{"type": "number", **limits}]}},
        "additionalProperties": {"type": "integer", "enum": [1]},
        "default": {"type": "integer"},
    }
