"""Items on their way: what a generator asks for, what becomes of it, and where finished ones are kept.

A finished item is a line of JSON in its shard's log, written at once: whatever is killed later, it is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Item:
    """One thing to make. `number` is its place in its generator; with the seed it decides everything else.

    prompt: what the teacher is asked, '' for procedural items; meta: provenance so far; facts: what verifiers need.
    """

    generator: str
    number: int
    seed: int
    prompt: str = ""
    meta: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.generator}/{self.number}"


@dataclass
class Made:
    """A finished item: `reason` is '' if it is accepted, else why not."""

    key: str
    text: str
    reason: str
    detail: str
    meta: dict[str, str]


def item_seed(seed: int, generator: str, number: int) -> int:
    """31 bits that belong to one item, whatever else is made."""
    digest = hashlib.sha256(f"{seed}\0{generator}\0{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def prompt_hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def finish(item: Item, text: str, verifier: str, verdict: str, cost: float = 0.0, **more: str) -> Made:
    """An accepted item, with its provenance: strings all of them, because `meta` holds strings."""
    return _made(item, text, "", "", verifier, verdict, cost, more)


def reject(
    item: Item, reason: str, detail: str = "", text: str = "", verifier: str = "", cost: float = 0.0, **more: str
) -> Made:
    return _made(item, text, reason, detail, verifier, "rejected", cost, more)


def _made(
    item: Item, text: str, reason: str, detail: str, verifier: str, verdict: str, cost: float, more: Mapping[str, str]
) -> Made:
    meta = {
        "path": item.key,
        "generator": item.generator,
        **item.meta,
        "prompt_hash": prompt_hash(item.prompt or str(item.facts.get("question", item.key))),
        "seed": str(item.seed),
        "verifier": verifier,
        "verdict": verdict,
        "cost": f"{cost:.8f}".rstrip("0").rstrip("."),
        **more,
    }
    return Made(item.key, text, reason, detail[:500], meta)


class Log:
    """The finished items of one shard, in a file that only grows. A torn last line is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Made]:
        if not self.path.exists():
            return {}
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self.path.write_bytes(whole)
        return {made.key: made for made in _parse(whole)}

    def add(self, made: Made) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(json.dumps(asdict(made), ensure_ascii=True).encode() + b"\n")


def _parse(data: bytes) -> Iterator[Made]:
    for line in data.splitlines():
        yield Made(**json.loads(line))
