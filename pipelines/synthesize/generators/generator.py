"""What a generator of a recipe can do: make items by itself, or ask a teacher for them and verify its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moray.actors.sandbox.limits import SandboxLimits
from moray.pipelines.synthesize.items import Item, Made
from moray.pipelines.synthesize.teacher import Answer

Ask = Callable[[Sequence[tuple[str, int]]], list[Answer]]  # an answer for each (prompt, seed)
SourceDocument = tuple[str, int]  # of the input `documents`: a shard's path, and the row in it


@dataclass(frozen=True)
class GeneratorContext:
    """limits, unsafe: of the sandbox. documents: by item number, for a generator that reads any."""

    limits: SandboxLimits
    unsafe: bool
    documents: Mapping[int, SourceDocument] = field(default_factory=dict)


class ItemAnswer(NamedTuple):
    """A teacher's answer to the prompt of an item, the seed it was asked with, and what it cost in dollars."""

    item: Item
    text: str
    seed: int
    cost: float


@dataclass
class VerifiedAnswer:
    """A document that was made of an answer, or the answer itself where it makes none.

    reason: why it is rejected, '' if it is accepted; detail: more words on it. trouble: engine or budget, if a further
    request, which the verifier needed, failed so. cost: dollars of such requests. meta: provenance of the document.
    """

    text: str
    reason: str = ""
    detail: str = ""
    verifier: str = ""
    cost: float = 0.0
    trouble: str = ""
    meta: dict[str, str] = field(default_factory=dict)


class ItemGenerator(ABC):
    """One generator of a recipe."""

    @abstractmethod
    def check(self, inputs: Collection[str]) -> None:
        """Raises RecipeError if one of the step's `inputs` or a package is missing, or if a task is unknown."""


class ProceduralGenerator(ItemGenerator):
    """Makes its items by itself."""

    @abstractmethod
    def make(self, item: Item) -> Made:
        """The finished item, accepted or rejected."""


class TaughtGenerator(ItemGenerator):
    """Asks a teacher for its items."""

    @abstractmethod
    def prompt(self, item: Item) -> str:
        """What the teacher is asked. Notes in the item's `meta` and `facts` what it was made of.

        Whatever it raises rejects this one item.
        """

    @abstractmethod
    def verify(self, answers: Sequence[ItemAnswer], ask: Ask) -> list[VerifiedAnswer]:
        """What becomes of each answer. `ask` is for further requests that this needs."""
