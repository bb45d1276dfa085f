"""The rules of filter on Python strings, one plain function for each family: no table, no hash, no kernel.

Each is written from its source (Gopher: arXiv 2112.11446, A.1 and table A1; C4: JMLR 21 (140), 2.2; FineWeb: arXiv
2406.17557, 3.6) with the choices that docs/filter.md lists. They give the first field of the recipe that a document
breaks, with its value, or None; C4's the text that is left.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import regex

from moray.pipelines.filter.config import C4, BasicRules, FineWeb, GopherQuality, GopherRepetition

Broken = tuple[str, float] | None
ELLIPSES = ("...", "\u2026")
TERMINAL = regex.compile(r"[\p{Sentence_Terminal}]")
SENTENCE = regex.compile(r"\p{Sentence_Terminal}[\p{Sentence_Terminal}\p{Pe}\p{Pf}\"']*(?=[\s\x1f]|$)")
SYMBOL = regex.compile(
    "[\x00-\x08\x0b-\x1f!-/:-@\\[-`{-\x9f\u00ab\u00b4\u00bb\u2013\u2014\u2019\u201c-\u201e\u2026\u2236\u2501\u25ba"
    "\u3001\u3002\u3008-\u300d\u3010\u3011\uff01\uff05\uff08\uff09\uff0c\uff0e\uff11\uff1a\uff1b\uff1f\uff5e]"
    r"|\p{Sentence_Terminal}"
)
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def first(
    rules: Iterator[tuple[str, float]], limits: GopherQuality | GopherRepetition | FineWeb | BasicRules
) -> Broken:
    """Of (field, value) pairs, in order, the first beyond its limit: fields are called min_ or max_."""
    for field, value in rules:
        limit = getattr(limits, field)
        if limit is not None and (value < limit if field.startswith("min_") else value > limit):
            return field, value
    return None


def basic(text: str, limits: BasicRules) -> Broken:
    def rules() -> Iterator[tuple[str, float]]:
        words, lines = text.split(), [line.strip() for line in text.splitlines() if line.strip()]
        count, many = max(len(words), 1), max(len(lines), 1)
        yield "min_words", len(words)
        yield "max_words", len(words)
        yield "min_mean_word_length", sum(map(len, words)) / count
        yield "max_mean_word_length", sum(map(len, words)) / count
        yield "max_symbol_ratio", (text.count("#") + sum(map(text.count, ELLIPSES))) / count
        yield "max_ellipsis_lines", sum(line.endswith(ELLIPSES) for line in lines) / many
        yield "min_alphabetic_words", sum(any(map(str.isalpha, word)) for word in words) / count
        yield "max_duplicate_lines", (len(lines) - len(set(lines))) / many

    return first(rules(), limits)


def gopher_quality(text: str, limits: GopherQuality) -> Broken:
    def rules() -> Iterator[tuple[str, float]]:
        words, lines = text.split(), text.splitlines()
        plain = [word for word in words if not all(map(SYMBOL.fullmatch, word))]
        count, many = max(len(words), 1), max(len(lines), 1)
        mean = sum(map(len, plain)) / max(len(plain), 1)
        yield "min_words", len(plain)
        yield "max_words", len(plain)
        yield "min_mean_word_length", mean
        yield "max_mean_word_length", mean
        yield "max_hashes", text.count("#") / count
        yield "max_ellipses", sum(map(text.count, ELLIPSES)) / count
        yield "max_bullet_lines", sum(line.strip().startswith(("-", "\u2022")) for line in lines) / many
        yield "max_ellipsis_lines", sum(line.strip().endswith(ELLIPSES) for line in lines) / many
        yield "min_alphabetic_words", sum(any(map(str.isalpha, word)) for word in words) / count
        yield "min_stop_words", len(set(words) & set(limits.stop_words))

    return first(rules(), limits)


def repeated(parts: list[str]) -> tuple[float, int]:
    """(share of the parts that came before, their characters)."""
    again = [part for i, part in enumerate(parts) if part in parts[:i]]
    return len(again) / len(parts), sum(map(len, again))


def top_gram(words: list[str], size: int) -> int:
    grams = [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]
    if not grams:
        return 0
    gram, times = Counter(grams).most_common(1)[0]
    return len(gram) * times


def repeated_grams(words: list[str], size: int) -> int:
    seen, characters, at = set(), 0, 0
    while at + size <= len(words):
        gram = tuple(words[at : at + size])
        if gram in seen:
            characters += sum(map(len, gram))
            at += size
        else:
            seen.add(gram)
            at += 1
    return characters


def gopher_repetition(text: str, limits: GopherRepetition) -> Broken:
    def rules() -> Iterator[tuple[str, float]]:
        words = text.split()
        for field, parts in (
            ("paragraph", re.split(r"\n\n+", text.strip())),
            ("line", re.split(r"\n+", text)),
        ):
            share, characters = repeated(parts)
            yield f"max_duplicate_{field}s", share
            yield f"max_duplicate_{field}_characters", characters / len(text)
        for size in (2, 3, 4):
            yield f"max_top_{size}_gram", top_gram(words, size) / len(text)
        for size in range(5, 11):
            yield f"max_duplicate_{size}_grams", repeated_grams(words, size) / len(text)

    return first(rules(), limits) if text else ("empty", 0)


def fineweb(text: str, limits: FineWeb) -> Broken:
    lines = [line for line in text.split("\n") if line.strip()]

    def rules() -> Iterator[tuple[str, float]]:
        punctuated = sum(TERMINAL.fullmatch(line[-1]) is not None for line in lines) / len(lines)
        if punctuated or not limits.allow_no_punctuation:
            yield "min_punctuated_lines", punctuated
        yield "max_short_lines", sum(len(line) <= limits.short_line for line in lines) / len(lines)
        yield "max_duplicate_line_characters", repeated(lines)[1] / len(text.replace("\n", ""))
        yield "max_newlines_per_word", text.count("\n") / len(text.split())

    return first(rules(), limits) if lines else ("empty", 0)


def sentences_of(line: str) -> int:
    """Those that end, and what is left behind the last."""
    ends = [found.end() for found in SENTENCE.finditer(line)]
    return len(ends) + bool(line[ends[-1] if ends else 0 :].strip())


def c4(text: str, limits: C4) -> Broken | str:
    """The text that is left, or what it is dropped for."""
    kept, sentences = [], 0
    for whole in text.splitlines():
        words = whole.split()
        if limits.max_word_length is not None and any(len(word) > limits.max_word_length for word in words):
            continue
        line = whole.strip()
        if limits.remove_citations:
            line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line)
        if limits.terminal_punctuation and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
            continue
        if limits.min_line_words is not None and len(words) < limits.min_line_words:
            continue
        lower = line.lower()
        if limits.drop_lorem_ipsum and "lorem ipsum" in lower:
            return "drop_lorem_ipsum", 1
        if limits.remove_javascript_lines and "javascript" in lower:
            continue
        if limits.drop_curly_brackets and "{" in line:
            return "drop_curly_brackets", 1
        if limits.remove_policy_lines and any(policy in lower for policy in POLICIES):
            continue
        sentences += sentences_of(line)
        kept.append(line)
    if limits.min_sentences is not None and sentences < limits.min_sentences:
        return "min_sentences", sentences
    return "\n".join(kept).strip() or ("empty", 0)
