"""The configuration of the step `filter`: families of rules with their limits, and the reasons for removal.

A limit of null turns its rule off. The order of a family's fields is the order in which its rules are applied, and the
order of the limits in the kernels' arrays.
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
    """A field with a limit between 0 and 1."""
    limit: float | None = Field(default, ge=0, le=1, description=description)
    return limit


def at_least_zero(default: float, description: str) -> float | None:
    """A field with a limit of 0 or more."""
    limit: float | None = Field(default, ge=0, description=description)
    return limit


class GopherQuality(StepConfig):
    """arXiv 2112.11446, A.1.1. Word counts and lengths exclude words that consist of symbols alone."""

    min_words: float | None = at_least_zero(50, "minimum words")
    max_words: float | None = at_least_zero(100_000, "maximum words")
    min_mean_word_length: float | None = at_least_zero(3, "minimum mean word length, in characters")
    max_mean_word_length: float | None = at_least_zero(10, "maximum mean word length, in characters")
    max_hashes: float | None = at_least_zero(0.1, "'#' per word")
    max_ellipses: float | None = at_least_zero(0.1, "ellipses per word")
    max_bullet_lines: float | None = share(0.9, "share of lines that begin with a bullet")
    max_ellipsis_lines: float | None = share(0.3, "share of lines that end in an ellipsis")
    min_alphabetic_words: float | None = share(0.8, "share of words with a letter")
    min_stop_words: float | None = at_least_zero(2, "minimum number of distinct `stop_words`")
    stop_words: tuple[str, ...] = Field(STOP_WORDS, description="stop words; the default is English")


class GopherRepetition(StepConfig):
    """arXiv 2112.11446, table A1."""

    max_duplicate_paragraphs: float | None = share(0.3, "share of paragraphs that are duplicates")
    max_duplicate_paragraph_characters: float | None = share(0.2, "share of characters in duplicate paragraphs")
    max_duplicate_lines: float | None = share(0.3, "share of lines that are duplicates")
    max_duplicate_line_characters: float | None = share(0.2, "share of characters in duplicate lines")
    max_top_2_gram: float | None = share(0.20, "share of characters in the most frequent 2-gram of words")
    max_top_3_gram: float | None = share(0.18, "share of characters in the most frequent 3-gram")
    max_top_4_gram: float | None = share(0.16, "share of characters in the most frequent 4-gram")
    max_duplicate_5_grams: float | None = share(0.15, "share of characters in duplicate 5-grams")
    max_duplicate_6_grams: float | None = share(0.14, "share of characters in duplicate 6-grams")
    max_duplicate_7_grams: float | None = share(0.13, "share of characters in duplicate 7-grams")
    max_duplicate_8_grams: float | None = share(0.12, "share of characters in duplicate 8-grams")
    max_duplicate_9_grams: float | None = share(0.11, "share of characters in duplicate 9-grams")
    max_duplicate_10_grams: float | None = share(0.10, "share of characters in duplicate 10-grams")


class C4(StepConfig):
    """JMLR 21 (140), 2.2. Edits documents: removes lines and citation marks."""

    min_sentences: float | None = at_least_zero(5, "minimum sentences in the remaining lines")
    drop_lorem_ipsum: bool = Field(True, description="drop documents with 'lorem ipsum'")
    drop_curly_brackets: bool = Field(True, description="drop documents with '{'")
    min_line_words: float | None = at_least_zero(3, "remove lines with fewer words")
    max_word_length: float | None = at_least_zero(1000, "remove lines with a longer word, in characters")
    terminal_punctuation: bool = Field(True, description="remove lines that do not end in . ? ! \" or '")
    remove_citations: bool = Field(True, description="remove [1], [edit] and [citation needed]")
    remove_javascript_lines: bool = Field(True, description="remove lines that mention javascript")
    remove_policy_lines: bool = Field(True, description="remove lines that mention cookies, privacy or terms of use")


class FineWeb(StepConfig):
    """arXiv 2406.17557, 3.6."""

    min_punctuated_lines: float | None = share(0.12, "share of lines that end in terminal punctuation")
    max_short_lines: float | None = share(0.67, "share of lines of at most `short_line` characters")
    max_duplicate_line_characters: float | None = share(0.01, "share of characters in duplicate lines")
    max_newlines_per_word: float | None = at_least_zero(0.3, "newlines per word")
    short_line: int = Field(30, ge=0, description="maximum length of a short line, in characters")
    allow_no_punctuation: bool = Field(False, description="keep documents in which no line has terminal punctuation")


class BasicRules(StepConfig):
    """Rules that suit code as well as prose. Their fields are in the step's own block."""

    min_words: int = Field(50, ge=0, description="minimum words")
    max_words: int = Field(100_000, gt=0, description="maximum words")
    min_mean_word_length: float = Field(2.0, ge=0, description="minimum mean word length, in characters")
    max_mean_word_length: float = Field(16.0, gt=0, description="maximum mean word length, in characters")
    max_symbol_ratio: float = Field(0.3, ge=0, description="'#' and ellipses per word")
    max_ellipsis_lines: float = Field(0.3, ge=0, le=1, description="share of lines that end in an ellipsis")
    min_alphabetic_words: float = Field(0.5, ge=0, le=1, description="share of words with a letter")
    max_duplicate_lines: float = Field(0.5, ge=0, le=1, description="share of lines that are duplicates")


class RulesConfig(BasicRules):
    """The families of rules to apply, in order, and their limits."""

    rules: tuple[Family, ...] = Field(("basic",), description="families of rules, in the order of application")
    gopher_quality: GopherQuality = GopherQuality()
    gopher_repetition: GopherRepetition = GopherRepetition()
    c4: C4 = C4()
    fineweb: FineWeb = FineWeb()

    def limits(self, family: Family) -> npt.NDArray[np.float64]:
        """The limits of a family in the order of its fields. NaN: off. A boolean rule has 0 (on) or NaN (off)."""
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
    """The reason for removing a document that breaks this limit: the recipe field, or the name of a basic rule."""
    return _BASIC[limit] if family == "basic" else f"{family}.{_fields(family)[limit]}"


class FilterConfig(RulesConfig):
    """The rules, the language and quality filters, and PII redaction."""

    languages: tuple[str, ...] = Field((), description="keep only these languages: ISO 639 codes of fastText's lid.176")
    min_language_score: float = Field(0.65, ge=0, le=1, description="minimum probability of the language")
    identify_language: bool = Field(False, description="write the language columns even without `languages`")

    min_quality: float | None = Field(None, ge=0, le=1, description="minimum score by the model in the input `quality`")
    quality_bands: tuple[float, ...] = Field(
        (0.5, 0.8), description="bounds of the quality bands: ascending scores between 0 and 1"
    )
    mask: tuple[Kind, ...] = Field((), description="kinds of PII and secrets to replace with `<email>` and so on")
    phone_regions: tuple[str, ...] = Field(
        (), description="ISO 3166 countries whose phone numbers are also found without '+'"
    )

    @field_validator("quality_bands")
    @classmethod
    def _ascending(cls, bands: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < one < 1 for one in bands) or sorted(set(bands)) != list(bands):
            raise ValueError("quality_bands must be ascending scores between 0 and 1, exclusive")
        return bands

    def out_of_order(self) -> str:
        """Describes the first minimum, in the families to apply, that exceeds its maximum; '' if there is none."""
        blocks = [("", self)] if "basic" in self.rules else []
        blocks += [(f"{name}.", getattr(self, name)) for name in self.rules if name != "basic"]
        for place, block in blocks:
            for name in _fields("basic") if not place else type(block).model_fields:
                low, high = getattr(block, name), getattr(block, name.replace("min_", "max_", 1), None)
                if name.startswith("min_") and None not in (low, high) and low > high:
                    return f"{place}{name} ({low:g}) exceeds {name.replace('min_', 'max_', 1)} ({high:g})"
        return ""

    @property
    def identifies(self) -> bool:
        return self.identify_language or bool(self.languages)

    def reasons(self) -> list[str]:
        """All reasons for removing a document, in the order of application."""
        found = [EMPTY] if self.rules != ("basic",) else []
        for family in self.rules:
            found += [reason(family, k) for k in range(len(_fields(family)))]
        return (
            list(dict.fromkeys(found))
            + (["language"] if self.languages else [])
            + (["quality"] if self.min_quality is not None else [])
        )
