"""Items to generate, finished items, and the log that stores finished items.

A finished item is immediately written as a JSON line to its shard's log, so a rerun after a kill does not generate it
again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from moray.platform.store.paths import AnyPath, StorePath

_STORE_SECONDS = 10.0  # between two writes of a log in the store


@dataclass
class Item:
    """One item to generate. `number` is its index in its generator; number and seed determine everything else.

    prompt: the prompt for the teacher, '' for procedural items. meta: provenance so far. facts: data for the verifiers.
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
class FinishedItem:
    """A finished item. `reason` is '' if it is accepted, else the reason for its rejection."""

    key: str
    text: str
    reason: str
    detail: str
    meta: dict[str, str]


def item_seed(seed: int, generator: str, number: int) -> int:
    """A 31-bit seed that depends only on the item."""
    digest = hashlib.sha256(f"{seed}\0{generator}\0{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def prompt_hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def finish(item: Item, text: str, verifier: str, result: str, cost: float = 0.0, **more: str) -> FinishedItem:
    """An accepted item with its provenance as strings, because `meta` holds strings."""
    return _made(item, text, "", "", verifier, result, cost, more)


def reject(
    item: Item, reason: str, detail: str = "", text: str = "", verifier: str = "", cost: float = 0.0, **more: str
) -> FinishedItem:
    return _made(item, text, reason, detail, verifier, "rejected", cost, more)


def _made(
    item: Item, text: str, reason: str, detail: str, verifier: str, result: str, cost: float, more: Mapping[str, str]
) -> FinishedItem:
    meta = {
        "path": item.key,
        "generator": item.generator,
        **item.meta,
        "prompt_hash": prompt_hash(item.prompt or str(item.facts.get("question", item.key))),
        "seed": str(item.seed),
        "verifier": verifier,
        "verdict": result,
        "cost": f"{cost:.8f}".rstrip("0").rstrip("."),
        **more,
    }
    return FinishedItem(item.key, text, reason, detail[:500], meta)


class Log:
    """The finished items of one shard, in an append-only file. A torn last line is ignored.

    An object in the store cannot be appended to. There, the log is rewritten every few seconds, and by `close`.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self._added: list[bytes] = []  # lines that are not in the store yet
        self._written = time.monotonic()

    def read(self) -> dict[str, FinishedItem]:
        data = self._stored()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self.path.write_bytes(whole)
        return {made.key: made for made in _parse(whole + b"".join(self._added))}

    def add(self, made: FinishedItem) -> None:
        line = json.dumps(asdict(made), ensure_ascii=True).encode() + b"\n"
        if isinstance(self.path, StorePath):
            self._added.append(line)
            if time.monotonic() - self._written > _STORE_SECONDS:
                self.close()
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(line)

    def close(self) -> None:
        """Writes what is not written yet."""
        if self._added:
            self.path.write_bytes(self._stored() + b"".join(self._added))
        self._added, self._written = [], time.monotonic()

    def _stored(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""


def _parse(data: bytes) -> Iterator[FinishedItem]:
    for line in data.splitlines():
        yield FinishedItem(**json.loads(line))
