"""The rules of filter against their definitions (oracle.py)."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.filter.config import C4, BasicRules, FilterConfig, FineWeb, GopherQuality, GopherRepetition
from moray.pipelines.filter.rules import FilteredDocuments, apply_rules
from moray.platform.plan.config import StepConfig
from tests.examples import examples
from tests.pipelines.filter import oracle

# Pieces that the rules match, in several scripts: ends of lines and sentences, bullets, symbols, marks, white space.
PIECES = (
    "the ", "be ", "of", "word ", "aB3 ", "12 ", "a b c d e ", "x y x y x y ", ". ", ".", "...", "\u2026", "! ",
    "? ", '"', "'", ")", "\xbb", "#", "- ", "\u2022", "\n", "\n\n", "\n \n", "\r\n", "\r", "\x0b", "\x1c", "\x1f",
    "\x85", "\u2028", "\xa0", "\u3000", " ", "\t", "[1]", "[\u0663]", "[]", "[edit]", "[citation needed]", "[1",
    "{", "javaScript ", "javascript", "Lorem Ipsum ", "use cookies ", "Terms of Use. ", "coo\u212aie policy ",
    "\u0130", "\xdf", "\u4e2d\u6587\u3002", "\u304b", "\u0915\u093f\u0964", "\u0301", "\U0001f600", "\U00020001",
    "\U0010fffd", "loooooooooong", "A line of its own.\n",
)  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
some_shares = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0])
shares = st.none() | some_shares
numbers = st.none() | st.sampled_from([0.0, 1.0, 2.0, 3.5, 5.0, 12.0])


def column(texts: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(texts, pa.large_string())])


def limits_of(block: type[StepConfig]) -> st.SearchStrategy[Any]:
    """A family's block with random limits. Other fields are random too, or keep their defaults."""
    fields: dict[str, Any] = {}
    for name, field in block.model_fields.items():
        if field.annotation is bool:
            fields[name] = st.booleans()
        elif name == "short_line":
            fields[name] = st.integers(0, 12)
        elif name.startswith(("min_", "max_")):
            is_share = any(hasattr(rule, "le") for rule in field.metadata)
            fields[name] = shares if is_share else numbers
    return st.builds(block, **fields)


def broken(filtered: FilteredDocuments) -> list[tuple[str, float] | None]:
    pairs = zip(filtered.reasons, filtered.values.tolist(), strict=True)
    return [None if reason is None else (reason.partition(".")[2] or reason, value) for reason, value in pairs]


BLOCKS: tuple[tuple[str, type[StepConfig], Any], ...] = (
    ("gopher_quality", GopherQuality, oracle.gopher_quality),
    ("gopher_repetition", GopherRepetition, oracle.gopher_repetition),
    ("fineweb", FineWeb, oracle.fineweb),
)


@pytest.mark.parametrize(("family", "block", "defined"), BLOCKS)
@settings(max_examples=examples(120), deadline=None)
@given(data=st.data(), documents=st.lists(texts, min_size=1, max_size=6))
def test_rules_are_those_of_their_definitions(
    family: str, block: type[StepConfig], defined: Any, data: st.DataObject, documents: list[str]
) -> None:
    limits = data.draw(limits_of(block))
    filtered = apply_rules(column(documents), FilterConfig(rules=(family,), **{family: limits}))
    expected = [defined(text, limits) if text else ("empty", 0) for text in documents]
    assert broken(filtered) == expected
    for reason, threshold in zip(filtered.reasons, filtered.limits.tolist(), strict=True):
        if reason and "." in reason:
            assert threshold == getattr(limits, reason.partition(".")[2])


LIMITS = [
    (family, block, defined, field)
    for family, block, defined in BLOCKS
    for field in block.model_fields
    if field.startswith(("min_", "max_"))
]


@pytest.mark.parametrize(("family", "block", "defined", "field"), LIMITS)
@settings(max_examples=examples(40), deadline=None)
@given(documents=st.lists(texts, min_size=1, max_size=8), short_line=st.integers(0, 12))
def test_every_value_is_that_of_the_definition(
    family: str, block: type[StepConfig], defined: Any, field: str, documents: list[str], short_line: int
) -> None:
    """Each limit alone, so tight that nearly every document breaks it."""
    off = {name: None for name in block.model_fields if name.startswith(("min_", "max_"))}
    is_share = any(hasattr(rule, "le") for rule in block.model_fields[field].metadata)
    tight = 0.0 if field.startswith("max_") else 1.0 if is_share else 1e9
    more = {"short_line": short_line} if block is FineWeb else {}
    limits = block(**off | {field: tight} | more)
    filtered = apply_rules(column(documents), FilterConfig(rules=(family,), **{family: limits}))
    assert broken(filtered) == [defined(text, limits) if text else ("empty", 0) for text in documents]


@settings(max_examples=examples(200), deadline=None)
@given(limits=limits_of(C4), documents=st.lists(texts, min_size=1, max_size=6))
def test_c4_edits_texts_as_its_definition_does(limits: C4, documents: list[str]) -> None:
    filtered = apply_rules(column(documents), FilterConfig(rules=("c4",), c4=limits))
    for text, found, left in zip(documents, broken(filtered), filtered.texts.to_pylist(), strict=True):
        expected = oracle.c4(text, limits) if text else ("empty", 0)
        assert (left if found is None else found) == expected


BASIC = {
    "too_short": {"min_words"}, "too_long": {"max_words"}, "symbols": {"max_symbol_ratio"},
    "word_length": {"min_mean_word_length", "max_mean_word_length"}, "ellipses": {"max_ellipsis_lines"},
    "not_alphabetic": {"min_alphabetic_words"}, "repeated_lines": {"max_duplicate_lines"},
}  # fmt: skip


@settings(max_examples=examples(120), deadline=None)
@given(data=st.data(), documents=st.lists(texts, min_size=1, max_size=6))
def test_basic_rules_are_those_of_their_definitions(data: st.DataObject, documents: list[str]) -> None:
    drawn = {
        "min_words": data.draw(st.integers(0, 6)), "max_words": data.draw(st.integers(1, 20)),
        "min_mean_word_length": data.draw(st.sampled_from([0.0, 2.0, 3.0])),
        "max_mean_word_length": data.draw(st.sampled_from([4.0, 8.0, 16.0])),
    } | {name: data.draw(some_shares) for name in (
        "max_symbol_ratio", "max_ellipsis_lines", "min_alphabetic_words", "max_duplicate_lines")}  # fmt: skip
    config = FilterConfig(**drawn)
    for found, text in zip(broken(apply_rules(column(documents), config)), documents, strict=True):
        expected = oracle.basic(text, BasicRules(**drawn))
        assert (found is None) == (expected is None)
        if found and expected:
            assert expected[0] in BASIC[found[0]]
            assert found[1] == expected[1]


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(texts, min_size=1, max_size=5), st.permutations(["basic", "gopher_quality", "c4", "fineweb"]))
def test_families_are_applied_in_the_order_of_the_recipe_to_the_edited_text(
    documents: list[str], order: list[str]
) -> None:
    loose = {"min_words": 1, "gopher_quality": GopherQuality(min_words=2), "c4": C4(min_sentences=1)}
    together = apply_rules(column(documents), FilterConfig(rules=tuple(order), **loose))
    for text, reason, left in zip(documents, together.reasons, together.texts.to_pylist(), strict=True):
        now, first = text, None
        for family in order:
            one = apply_rules(column([now]), FilterConfig(rules=(family,), **loose))
            now, first = one.texts.to_pylist()[0], one.reasons[0]
            if first:
                break
        assert reason == first
        if reason is None:
            assert left == now


def test_slices_of_a_column_give_the_same_results() -> None:
    documents = [f"{i} words of a text. " * i for i in range(12)]
    config = FilterConfig(rules=("gopher_quality", "c4"), c4=C4(min_sentences=None))
    whole = apply_rules(column(documents), config)
    part = apply_rules(column(documents).slice(3, 5), config)
    assert part.reasons == whole.reasons[3:8]
    parts = pa.chunked_array([pa.array(documents[:5], pa.large_string()), pa.array(documents[5:], pa.large_string())])
    assert apply_rules(parts, config).reasons == whole.reasons
    assert apply_rules(pa.chunked_array([], pa.large_string()), config).reasons == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("two words", "too_short"),
        (" ".join(["word"] * 120), "too_long"),
        (" ".join(["a"] * 60), "word_length"),
        (" ".join(["word #"] * 40), "symbols"),
        ("\n".join(f"line {i} of some words here ..." for i in range(9)), "ellipses"),
        (" ".join(["1234 5678"] * 40), "not_alphabetic"),
        ("\n".join(["the very same line again"] * 20), "repeated_lines"),
        ("\n".join(f"line number {i} of a fine document" for i in range(12)), None),
    ],
)
def test_each_basic_rule_drops_its_kind_of_document(text: str, reason: str | None) -> None:
    assert apply_rules(column([text]), FilterConfig(min_words=20, max_words=100)).reasons == [reason]
