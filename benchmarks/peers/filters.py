"""datatrove's filters on texts in memory: what each decides of each document, and the CPU-seconds of all four.

Words are what lies between white space, sentences end as docs/filter.md says, so that both sides are given the same. A
document passes the four in FineWeb's order, up to the first that drops it; texts and decisions stay in memory, so no
reader and no writer is in the figure. Runs in the peers' environment (`make bench-peers`).

Usage: python filters.py TEXTS.parquet OUT.json
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pyarrow.parquet as pq
import regex
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.text import TERMINAL_PUNCTUATION
from datatrove.utils.word_tokenizers import WordTokenizer

ENDS = "".join(TERMINAL_PUNCTUATION)
SENTENCE = regex.compile(rf"[{regex.escape(ENDS)}][{regex.escape(ENDS)}\p{{Pe}}\p{{Pf}}\"']*(?=[\s\x1f]|$)")


class Spaces(WordTokenizer):
    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[begin:end] for begin, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        ends = [found.end() for found in SENTENCE.finditer(text)]
        if text[ends[-1] if ends else 0 :].strip():
            ends.append(len(text))
        return list(zip([0, *ends[:-1]], ends, strict=True))


def filters() -> dict[str, Any]:
    words: Any = Spaces()
    return {
        "gopher_repetition": GopherRepetitionFilter(language=words),
        "gopher_quality": GopherQualityFilter(language=words),
        "c4": C4QualityFilter(language=words),
        "fineweb": FineWebQualityFilter(language=words),
    }


def decide(one: Any, document: Document) -> str | None:
    """The reason that a filter drops the document for, or None."""
    kept = one.filter(document)
    return None if kept is True else kept[1]


def run(texts: list[str]) -> list[str | None]:
    """What each document is dropped for by the four, one after another."""
    chain, found = filters(), []
    for i, text in enumerate(texts):
        document = Document(text, str(i))
        reasons = ((name, decide(one, document)) for name, one in chain.items())
        found.append(next((f"{name}.{reason}" for name, reason in reasons if reason), None))
    return found


def alone(texts: list[str]) -> dict[str, list[Any]]:
    """By filter: of each document the reason, or None; and the texts that C4 leaves."""
    found: dict[str, list[Any]] = {}
    for name, one in filters().items():
        documents = [Document(text, str(i)) for i, text in enumerate(texts)]
        found[name] = [decide(one, document) for document in documents]
        if name == "c4":
            kept = zip(found[name], documents, strict=True)
            found["c4 texts"] = [None if reason else document.text for reason, document in kept]
    return found


def main(path: str, out: str) -> None:
    texts = pq.read_table(path)["text"].to_pylist()
    run(texts[:50])
    began = time.process_time()
    together = run(texts)
    took = time.process_time() - began
    if out != "-":
        with open(out, "w") as file:
            json.dump({"together": together, **alone(texts)}, file)
    print(json.dumps({"cpu_s": took}))


if __name__ == "__main__":
    main(*sys.argv[1:])
