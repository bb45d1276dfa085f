"""Structured output: grammars that restrict which ids an answer may continue with.

llguidance compiles a grammar and computes the ids that may follow. It keeps derivatives of regular expressions and
items of an Earley parser, so no grammar backtracks; `_LIMITS` bounds its time and memory. Compiling releases the GIL.

Shapes: V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark
from torch import Tensor

from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.pipelines.serve.json_schema import bounded_numbers

# A mask takes at most about 15 ms, a grammar about 60 MB. Errors must not quote the parser's state.
_LIMITS = LLParserLimits(step_lexer_fuel=200_000, step_max_items=50_000, max_lexer_states=30_000, verbose_errors=False)
_KEPT = 32  # compiled grammars
_BITS = torch.arange(8, dtype=torch.uint8)
# JSON without free white space, because a model may continue it without end; one space after a separator is common.
_JSON = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class GrammarError(ValueError):
    """A grammar that cannot be compiled, or is too complex to go on with."""


@dataclass(frozen=True)
class GrammarText:
    """A grammar in llguidance's dialect of Lark. rule: the right side of a rule. parts: grammars that it names by
    `@name`."""

    rule: str
    parts: Mapping[str, str] = field(default_factory=dict)

    def source(self) -> str:
        """Input of llguidance."""
        lark = {"": f"start: {self.rule}", **self.parts}
        return json.dumps({"grammars": [{"name": name or "main", "lark_grammar": text} for name, text in lark.items()]})


def of_schema(schema: Mapping[str, Any] | bool, lenient: bool = False) -> GrammarText:
    """JSON that is valid against a schema. lenient: leaves keywords out that are not supported, instead of being an
    error. Raises RecursionError for a schema that is nested too deeply."""
    node = bounded_numbers(schema) if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    return GrammarText("%json " + json.dumps({**node, "x-guidance": {**_JSON, "lenient": lenient}}))


def of_regex(regex: str) -> GrammarText:
    """Text that a regular expression matches as a whole. Look-around and back-references do not exist."""
    return GrammarText(f"/{regex_to_lark(regex, use_ascii='')}/")


def of_choice(choices: tuple[str, ...]) -> GrammarText:
    """One of these strings."""
    return GrammarText(" | ".join(json.dumps(choice) for choice in choices))


def of_grammar(text: str) -> GrammarText:
    """A grammar in Lark's or llama.cpp's notation (GBNF). Raises GrammarError."""
    try:
        lark = any_to_lark(text)
    except Exception as error:  # the converter raises bare Exception
        raise GrammarError(str(error)) from error
    if not re.search(r"^\s*start\s*:", lark, re.MULTILINE):
        raise GrammarError("the grammar has no rule `start`")
    return GrammarText("@user", {"user": lark})


class Grammar:
    """A compiled grammar, from which any number of answers start."""

    def __init__(self, matcher: LLMatcher, ends: frozenset[int], tokens: int) -> None:
        self._matcher, self._ends, self._tokens = matcher, ends, tokens

    def start(self) -> GrammarState:
        return GrammarState(self._matcher.deep_copy(), self._ends, self._tokens)


class GrammarState:
    """The place of one answer in its grammar. ended: whether the answer is complete.

    ends: ids that end an answer, allowed where the grammar may end. tokens: of the vocabulary; the id after them stands
    for the end in llguidance.
    """

    def __init__(self, matcher: LLMatcher, ends: frozenset[int], tokens: int) -> None:
        self._matcher, self._ends, self._tokens = matcher, ends, tokens
        self.ended = False

    def mask(self, logits_V: Tensor, short: bool = False) -> None:
        """Sets the logits of ids that may not follow to -inf, in place. short: the logits of ids that end an answer are
        -inf already, which does not count if nothing else may follow. Raises GrammarError."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise GrammarError(f"the grammar is too complex here: {_first_line(self._matcher.get_error())}")
        flags = ((bits.unsqueeze(1) >> _BITS) & 1).bool().flatten()
        allowed_V = torch.zeros(len(logits_V), dtype=torch.bool)
        count = min(self._tokens, len(logits_V))
        allowed_V[:count] = flags[:count]
        ends = [index for index in self._ends if index < len(logits_V)]
        allowed_V[ends] = bool(flags[self._tokens])
        if not allowed_V.any():
            raise GrammarError("no token of this model may follow in the grammar")
        allowed_V = allowed_V.to(logits_V.device)
        logits_V.masked_fill_(~allowed_V, -torch.inf)
        if short and bool(logits_V.isneginf().all()):
            logits_V[allowed_V] = 0.0

    def accept(self, index: int) -> None:
        """Goes on by one generated id. Raises GrammarError."""
        if index in self._ends:
            self.ended = True
        elif not self._matcher.consume_token(index):
            raise GrammarError(f"the grammar cannot go on: {_first_line(self._matcher.get_error())}")
        else:
            self.ended = self._matcher.is_stopped()


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps the latest. Thread-safe."""

    def __init__(self, vocabulary: ServingVocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = Lock()

    def compile(self, text: GrammarText) -> Grammar:
        """Raises GrammarError for what llguidance cannot do, with the keyword."""
        source = text.source()
        with self._lock:
            if source in self._kept:
                self._kept.move_to_end(source)
                return self._kept[source]
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._vocabulary)
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        first = matcher.deep_copy()
        first.compute_bitmask()
        if first.is_error():  # of a recursion without an end, for instance
            raise GrammarError(_reason(first.get_error()))
        grammar = Grammar(matcher, self._vocabulary.ends, len(self._vocabulary.pieces))
        with self._lock:
            self._kept[source] = grammar
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return grammar


class _Tokens:
    """A vocabulary as llguidance reads it, with one more id for the end, because a model may have several or none."""

    def __init__(self, vocabulary: ServingVocabulary) -> None:
        count = len(vocabulary.pieces)
        special = [index for index, piece in enumerate(vocabulary.pieces) if not piece]
        self.eos_token_id, self.bos_token_id = count, None
        self.special_token_ids = [*special, count]
        self.tokens = [piece or b"<%d>" % index for index, piece in enumerate(vocabulary.pieces)] + [b"<%d>" % count]
        self._vocabulary = vocabulary

    def __call__(self, text: bytes | str) -> list[int]:
        return self._vocabulary.encode(text.decode() if isinstance(text, bytes) else text)


def _tokenizer(vocabulary: ServingVocabulary) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Tokens(vocabulary)))


def _reason(error: str) -> str:
    """One sentence of llguidance's message."""
    keys = re.search(r"Unimplemented keys: \[(.*)\]", error)
    if "NoExtensionBias" in error:
        return "no text follows it"
    if "recursion limit" in error:
        return "nested too deeply"
    if keys:
        return "not supported: " + keys[1].replace('"', "")
    error = re.sub(r"\s*\n\s*", " ", error).strip().partition(" 1 | start:")[0]
    return re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", error)[:300]


def _first_line(error: str) -> str:
    return error.strip().partition("\n")[0][:300]
