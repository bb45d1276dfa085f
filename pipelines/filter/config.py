"""What a recipe may say of the rules: families, each with its limits; and the reasons that documents are removed for.

A limit that is null is off. The order of a family's fields is that in which its rules are tried, and the place of its
limits in the kernels' arrays.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from moray.pipelines.filter.redact import Kind
from moray.platform.plan.config import StepConfig

Family = Literal["basic", "gopher_quality", "gopher_repetition", "c4", "fineweb"]
FAMILIES: tuple[Family, ...] = ("basic", "gopher_quality", "gopher_repetition", "c4", "fineweb")
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


def share(default: float, description: str) -> float | None:
    """A limit of something between 0 and 1."""
    limit: float | None = Field(default, ge=0, le=1, description=description)
    return limit


def at_least_zero(default: float, description: str) -> float | None:
    limit: float | None = Field(default, ge=0, description=description)
    return limit


class GopherQuality(StepConfig):
    """arXiv 2112.11446, A.1.1. Words of symbols alone are no words where words are counted and measured."""

    min_words: float | None = at_least_zero(50, "words")
    max_words: float | None = at_least_zero(100_000, "words")
    min_mean_word_length: float | None = at_least_zero(3, "characters of a word, on average")
    max_mean_word_length: float | None = at_least_zero(10, "characters of a word, on average")
    max_hashes: float | None = at_least_zero(0.1, "'#' per word")
    max_ellipses: float | None = at_least_zero(0.1, "ellipses per word")
    max_bullet_lines: float | None = share(0.9, "of lines, that begin with a bullet")
    max_ellipsis_lines: float | None = share(0.3, "of lines, that end in an ellipsis")
    min_alphabetic_words: float | None = share(0.8, "of words, that have a letter")
    min_stop_words: float | None = at_least_zero(2, "different ones of `stop_words`")
    stop_words: tuple[str, ...] = Field(STOP_WORDS, description="of English; other languages need others")


class GopherRepetition(StepConfig):
    """arXiv 2112.11446, table A1."""

    max_duplicate_paragraphs: float | None = share(0.3, "of paragraphs, that came before")
    max_duplicate_paragraph_characters: float | None = share(0.2, "of characters, in such")
    max_duplicate_lines: float | None = share(0.3, "of lines, that came before")
    max_duplicate_line_characters: float | None = share(0.2, "of characters, in such")
    max_top_2_gram: float | None = share(0.20, "of characters, in the most frequent 2 words")
    max_top_3_gram: float | None = share(0.18, "of characters, in the most frequent 3 words")
    max_top_4_gram: float | None = share(0.16, "of characters, in the most frequent 4 words")
    max_duplicate_5_grams: float | None = share(0.15, "of characters, in 5 words that came before")
    max_duplicate_6_grams: float | None = share(0.14, "of characters, in 6 words that came before")
    max_duplicate_7_grams: float | None = share(0.13, "of characters, in 7 words that came before")
    max_duplicate_8_grams: float | None = share(0.12, "of characters, in 8 words that came before")
    max_duplicate_9_grams: float | None = share(0.11, "of characters, in 9 words that came before")
    max_duplicate_10_grams: float | None = share(0.10, "of characters, in 10 words that came before")


class C4(StepConfig):
    """JMLR 21 (140), 2.2. Changes documents: lines go, and marks of citations."""

    min_sentences: float | None = at_least_zero(5, "in the lines that stay")
    drop_lorem_ipsum: bool = Field(True, description="documents with 'lorem ipsum'")
    drop_curly_brackets: bool = Field(True, description="documents with '{'")
    min_line_words: float | None = at_least_zero(3, "lines of fewer words go")
    max_word_length: float | None = at_least_zero(1000, "lines with a word of more characters go")
    terminal_punctuation: bool = Field(True, description="lines that do not end in . ? ! \" or ' go")
    remove_citations: bool = Field(True, description="[1], [edit] and [citation needed] go")
    remove_javascript_lines: bool = Field(True, description="lines that speak of javascript go")
    remove_policy_lines: bool = Field(True, description="lines that speak of cookies, privacy and terms of use go")


class FineWeb(StepConfig):
    """arXiv 2406.17557, 3.6."""

    min_punctuated_lines: float | None = share(0.12, "of lines, that end a sentence")
    max_short_lines: float | None = share(0.67, "of lines, that are of `short_line` characters at most")
    max_duplicate_line_characters: float | None = share(0.01, "of characters, in lines that came before")
    max_newlines_per_word: float | None = at_least_zero(0.3, "newlines per word")
    short_line: int = Field(30, ge=0, description="characters")
    allow_no_punctuation: bool = Field(False, description="keep a document in which no line ends a sentence")


class BasicRules(StepConfig):
    """The rules that hold for code as well as prose; they stand in the step's own block."""

    min_words: int = Field(50, ge=0)
    max_words: int = Field(100_000, gt=0)
    min_mean_word_length: float = Field(2.0, ge=0)
    max_mean_word_length: float = Field(16.0, gt=0)
    max_symbol_ratio: float = Field(0.3, ge=0, description="'#' and ellipses per word")
    max_ellipsis_lines: float = Field(0.3, ge=0, le=1, description="share of lines that end in an ellipsis")
    min_alphabetic_words: float = Field(0.5, ge=0, le=1, description="share of words with a letter")
    max_duplicate_lines: float = Field(0.5, ge=0, le=1, description="share of lines seen before in the document")


class RulesConfig(BasicRules):
    """Which families are used, in this order, and their limits."""

    rules: tuple[Family, ...] = Field(("basic",), description="families of rules, in the order they are tried in")
    gopher_quality: GopherQuality = GopherQuality()
    gopher_repetition: GopherRepetition = GopherRepetition()
    c4: C4 = C4()
    fineweb: FineWeb = FineWeb()

    def limits(self, family: Family) -> npt.NDArray[np.float64]:
        """A family's limits in the order of its fields; NaN: off. A rule that is on or off has 0, or NaN."""
        block = self if family == "basic" else getattr(self, family)
        values = [getattr(block, name) for name in _fields(family)]
        if family == "fineweb":
            return np.array([math.nan if value is None else float(value) for value in values], np.float64)
        return np.array([_limit(value) for value in values], np.float64)


def _limit(value: float | bool | None) -> float:
    if value is None or value is False:
        return math.nan
    return 0.0 if value is True else float(value)


def _fields(family: Family) -> list[str]:
    blocks: dict[str, type[StepConfig]] = {
        "basic": BasicRules, "gopher_quality": GopherQuality, "gopher_repetition": GopherRepetition, "c4": C4,
        "fineweb": FineWeb,
    }  # fmt: skip
    return [name for name in blocks[family].model_fields if name != "stop_words"]


_BASIC = (
    "too_short", "too_long", "word_length", "word_length", "symbols", "ellipses", "not_alphabetic", "repeated_lines",
)  # fmt: skip
EMPTY = "empty"


def reason(family: Family, limit: int) -> str:
    """What a document is removed for that breaks this limit: the field of the recipe that says so."""
    return _BASIC[limit] if family == "basic" else f"{family}.{_fields(family)[limit]}"


class FilterConfig(RulesConfig):
    """The rules, and what else a document is held to."""

    languages: tuple[str, ...] = Field((), description="documents in others go: codes of ISO 639, as fastText has them")
    min_language_score: float = Field(0.65, ge=0, le=1, description="the probability of the language, at least")
    identify_language: bool = Field(False, description="say the language without `languages` too")

    min_quality: float | None = Field(None, ge=0, le=1, description="the score by the input `quality`, at least")
    quality_bands: tuple[float, ...] = Field(
        (0.5, 0.8), description="scores between 0 and 1 that part bands, ascending"
    )
    mask: tuple[Kind, ...] = Field((), description="what becomes `<email>` and so on in the documents that stay")
    phone_regions: tuple[str, ...] = Field(
        (), description="countries whose phone numbers are found without '+' too: two letters of ISO 3166"
    )

    @field_validator("quality_bands")
    @classmethod
    def _ascending(cls, bands: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < one < 1 for one in bands) or sorted(set(bands)) != list(bands):
            raise ValueError("must ascend, between 0 and 1")
        return bands

    def out_of_order(self) -> str:
        """The first limit, of the families that are used, that no document can meet: a least above its most; or ''."""
        blocks = [("", self)] if "basic" in self.rules else []
        blocks += [(f"{name}.", getattr(self, name)) for name in self.rules if name != "basic"]
        for place, block in blocks:
            for name in _fields("basic") if not place else type(block).model_fields:
                least, most = getattr(block, name), getattr(block, name.replace("min_", "max_", 1), None)
                if name.startswith("min_") and None not in (least, most) and least > most:
                    return f"{place}{name} ({least:g}) is more than {name.replace('min_', 'max_', 1)} ({most:g})"
        return ""

    @property
    def identifies(self) -> bool:
        return self.identify_language or bool(self.languages)

    def reasons(self) -> list[str]:
        """All that a document may be removed for, in the order they are tried in."""
        found = [EMPTY] if self.rules != ("basic",) else []
        for family in self.rules:
            found += [reason(family, k) for k in range(len(_fields(family)))]
        return (
            list(dict.fromkeys(found))
            + (["language"] if self.languages else [])
            + (["quality"] if self.min_quality is not None else [])
        )
