"""Words of dedup and decontaminate in every form that Unicode has for them."""
# ruff: noqa: RUF001

from __future__ import annotations

import random
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.decontaminate.eval_index import Grams, build_index
from moray.pipelines.decontaminate.evals import EvalText
from moray.pipelines.text.characters import SIZE, fold
from moray.pipelines.text.minhash import Shingling
from tests.examples import examples
from tests.pipelines.dedup import oracle
from tests.pipelines.dedup.test_step import column, mixed


def stays(one: str) -> bool:
    """What is not folded, because it would become more characters than it has bytes."""
    return fold(one) == one != oracle.normalized(one)


@st.deferred
def folded() -> st.SearchStrategy[str]:
    unfolded = [one for one in map(chr, [*range(0xD800), *range(0xE000, SIZE)]) if stays(one)]
    return st.text(st.characters(codec="utf-8", exclude_characters=unfolded), max_size=40)


@pytest.mark.parametrize("unit", ["words", "characters"])
@settings(max_examples=examples(300), deadline=None)
@given(text=folded | mixed.map(lambda text: "".join(one for one in text if not stays(one))), seed=st.integers(0, 9))
def test_every_form_of_a_text_has_the_same_shingles(unit: str, text: str, seed: int) -> None:
    """datatrove#234: the same text composed and decomposed were two."""
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    generator = random.Random(seed)
    soft = "".join(one + generator.choice(["", "\u00ad", "\u200b", "\u2060"]) for one in text)
    sets, bounds = Shingling(1, unit == "characters").sets(column([text, *forms, soft, text.casefold()]))
    found = [sets[begin:end].tolist() for begin, end in pairwise(bounds)]
    assert all(one == found[0] for one in found)


SPELLINGS = [
    ("Straße Größe", "STRASSE GRÖSSE"), ("ὀδυσσεύς", "ὈΔΥΣΣΕΎΣ"), ("Iğdır ılıca", "IĞDIR ILICA"), ("İzmir", "izmir"),
    ("ﬁnal oﬀer", "FINAL OFFER"), ("ＡＢＣ１２", "abc12"), ("exam\u00adple", "example"), ("\ufeffone", "one"),
    ("كتـــاب", "كتاب"), ("ｶﾞｷﾞ", "ガギ"), ("คำ", "ค\u0e4d\u0e32"), ("résumé", "resume"), ("שָׁלוֹם", "שלום"),
    ("x² ① ㎏", "x2 1 kg"), ("نمی\u200cدانم", "نمیدانم"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), SPELLINGS)
def test_the_same_words_in_two_spellings(one: str, other: str) -> None:
    for characters in (False, True):
        sets, bounds = Shingling(1, characters).sets(column([one, other]))
        assert 0 < bounds[1] < bounds[2]
        assert sets[: bounds[1]].tolist() == sets[bounds[1] :].tolist()


LETTERS = [
    ("ภาษาไทย", 7),
    ("ភាសាខ្មែរ", 5),
    ("မြန်မာ", 3),
    ("한국어", 3),
    ("中文字", 3),
    ("हिन्दी में", 2),
    ("๒๕๖๓", 1),
    ("ﷺ", 1),
]


@pytest.mark.parametrize(("text", "count"), LETTERS)
def test_words_of_scripts_without_spaces_are_letters(text: str, count: int) -> None:
    assert Shingling(1).keys(column([text]))[1].tolist() == [count]


@pytest.mark.parametrize(("first", "last"), [(0x0E01, 0x0E2E), (0x0E81, 0x0EAE), (0x1000, 0x1021), (0x1780, 0x17A2)])
def test_items_in_scripts_without_spaces_are_looked_for(first: int, last: int) -> None:
    """marin#6852: every Thai item was "too short"; and three words of Thai are no n-gram."""
    generator = random.Random(first)
    letters = [chr(code) for code in range(first, last) if chr(code).isalpha()]
    item = " ".join("".join(generator.choices(letters, k=30)) for _ in range(5))
    index = build_index([EvalText("e", "0", "f", item)], Grams())
    host = "".join(generator.choices(letters, k=200))
    found = index.find(column([host + item[10:90] + host, host + item[10:40] + host]))
    assert {match.row for match in found} == {0}
    assert set(index.sizes.tolist()) == {39}


def test_matches_are_shown_as_written() -> None:
    sentence = "L’été dernier, les élèves étudiaient précisément où naît la rivière près du château"
    words = sentence.split()
    index = build_index([EvalText("e", "0", "f", sentence)], Grams(size=8))
    text = unicodedata.normalize("NFD", "On dit: " + "\u00a0".join(words) + " Fin")
    assert index.find(column([text]))[-1].excerpt == "\u00a0".join(
        unicodedata.normalize("NFD", word) for word in words[-8:]
    )
