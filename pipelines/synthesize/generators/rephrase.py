"""Rephrasings of input documents in one of several styles."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from moray.pipelines.shared.documents import read_shard, shard_paths
from moray.pipelines.synthesize.config import Rephrase
from moray.pipelines.synthesize.generators.generator import (
    GeneratorContext,
    ItemAnswer,
    Query,
    SourceDocument,
    TeacherGenerator,
    VerifiedAnswer,
)
from moray.pipelines.synthesize.items import Item
from moray.platform.core.errors import RecipeError
from moray.platform.store.paths import AnyPath, any_path, in_threads

_STYLES = {
    "faq": "Turn the text below into questions that a reader might ask, each with a full answer from the text.",
    "table": "Put the facts of the text below into a Markdown table, and say in a paragraph below it what it shows.",
    "tutorial": "Rewrite the text below as a tutorial that teaches its subject step by step, with explanations.",
    "maths": "Write a word problem with numbers about the subject of the text below, and solve it step by step.",
}
_ONLY = "Use only what the text says. Answer with the result alone.\n\nText:\n"
_TABLE = re.compile(r"^\s*\|?[^|\n]+\|[^\n]*\n\s*\|?\s*:?-{3,}", re.MULTILINE)


class RephraseGenerator(TeacherGenerator):
    def __init__(self, config: Rephrase, context: GeneratorContext) -> None:
        self._config, self._documents = config, context.documents

    def check(self, inputs: Collection[str]) -> None:
        if "documents" not in inputs:
            raise RecipeError(
                f"generator {self._config.name!r} needs the input `documents`", "set the step's input `documents`"
            )

    def prompt(self, item: Item) -> str:
        path, row = self._documents[item.number]
        drawn = read_shard(any_path(path), ["id", "text"]).slice(row, 1)
        style = self._config.styles[item.number % len(self._config.styles)]
        item.meta |= {"style": style, "document": drawn["id"][0].as_py()}
        item.facts["text"] = drawn["text"][0].as_py()
        return f"{_STYLES[style]} {_ONLY}{item.facts['text'][: self._config.max_characters]}"

    def verify(self, answers: Sequence[ItemAnswer], query: Query) -> list[VerifiedAnswer]:
        """Checks the format only: minimum length, requested style, not a copy. Does not check factual accuracy."""
        results = []
        for answer in answers:
            text = answer.text.strip()
            detail = self._flaw(text, answer.item)
            results.append(VerifiedAnswer(text + "\n", "form" if detail else "", detail, "form"))
        return results

    def _flaw(self, text: str, item: Item) -> str:
        style = item.meta["style"]
        if len(text) < self._config.min_characters:
            return f"{len(text)} characters"
        if style == "table" and not _TABLE.search(text):
            return "no table"
        if style == "faq" and "?" not in text:
            return "no question"
        return "a copy of the text" if text in item.facts["text"] else ""


def draw_documents(folder: AnyPath, wanted: int, seed: int) -> list[SourceDocument]:
    """The documents to rephrase: those with the smallest hashes of their ids, independent of the sharding."""
    import xxhash

    paths = shard_paths(folder)
    ids = in_threads(lambda path: read_shard(path, ["id"])["id"].to_pylist(), paths)
    found = [
        (xxhash.xxh3_128_hexdigest(f"{seed}\0{name}".encode()), str(path), row)
        for path, names in zip(paths, ids, strict=True)
        for row, name in enumerate(names)
    ]
    return [(path, row) for _, path, row in sorted(found)[:wanted]]
