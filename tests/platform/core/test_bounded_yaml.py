"""Untrusted YAML is bounded in depth, size and alias expansion before it is parsed."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moray.platform.core.bounded_yaml import DEEPEST, MOST_BYTES, MOST_NODES, check_bounds, compose
from moray.platform.core.errors import RecipeError


def laughs(levels: int) -> str:
    return "a0: &a0 [lol]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, levels))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 50_000, "nested deeper"),
        ("[" * 900 + "]" * 900, "nested deeper"),
        ("{a: " * 400 + "1" + "}" * 400, "nested deeper"),
        ("- " * 5_000 + "a", "nested deeper"),
        (laughs(24), "aliases expand to more"),
        ("a: &x {b: *x}", r"\*x contains itself"),
        ("&x [[[*x]]]", r"\*x contains itself"),
        ("a" * (MOST_BYTES + 1), "characters; the limit is"),
        ("a: !!binary aGVsbG8=", "!!binary"),
    ],
)
def test_yaml_beyond_the_bounds_is_rejected(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        compose(text)


def test_yaml_at_the_bounds_is_accepted() -> None:
    assert compose("[" * DEEPEST + "]" * DEEPEST)
    assert compose(laughs(8))[1]["a7"]
    assert compose("a: &w {b: 1}\nc: {<<: *w, d: 2}\ne: *w")[1] == {"a": {"b": 1}, "c": {"b": 1, "d": 2}, "e": {"b": 1}}
    assert compose("") == (None, None)


values = st.recursive(
    st.none() | st.integers() | st.text("ab ", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
)


@given(values, st.booleans())
def test_accepted_yaml_has_the_value_that_yaml_reads(value: object, flow: bool) -> None:
    text = yaml.safe_dump(value, default_flow_style=flow)
    assert compose(text)[1] == value


@given(st.integers(1, 40))
def test_the_count_includes_expanded_aliases(levels: int) -> None:
    """Each level has twice the values of the one before, and itself."""
    sizes = [2]
    for _ in range(levels - 1):
        sizes.append(2 * sizes[-1] + 1)
    whole = 1 + sum(sizes) + levels  # and the keys
    if whole > MOST_NODES:
        with pytest.raises(RecipeError):
            check_bounds(laughs(levels))
    else:
        check_bounds(laughs(levels))
