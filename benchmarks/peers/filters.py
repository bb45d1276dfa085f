"""datatrove's filters on texts in memory: the decision of each filter for each document, and the total CPU-seconds.

Words are split at white space and sentences end as described in docs/filter.md, so that both engines get the same
input. A document passes the four filters in FineWeb's order, up to the first that removes it. Texts and decisions stay
in memory, so the time includes no reader and no writer. Runs in the peers' environment (`make bench-peers`).

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
    """The reason for which a filter removes the document, or None."""
    kept = one.filter(document)
    return None if kept is True else kept[1]


def run(texts: list[str]) -> list[str | None]:
    """The reason for which the four filters in sequence remove each document, or None."""
    chain, found = filters(), []
    for i, text in enumerate(texts):
        document = Document(text, str(i))
        reasons = ((name, decide(one, document)) for name, one in chain.items())
        found.append(next((f"{name}.{reason}" for name, reason in reasons if reason), None))
    return found


def alone(texts: list[str]) -> dict[str, list[Any]]:
    """The reason or None for each document, by filter applied alone, and the texts that C4 leaves."""
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
