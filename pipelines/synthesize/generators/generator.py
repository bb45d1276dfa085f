"""Base classes of generators: procedural generators, and generators that query a teacher and verify its answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moray.actors.sandbox.limits import SandboxLimits
from moray.pipelines.synthesize.items import FinishedItem, Item
from moray.pipelines.synthesize.teacher import Answer

Query = Callable[[Sequence[tuple[str, int]]], list[Answer]]  # an answer for each (prompt, seed)
SourceDocument = tuple[str, int]  # in the input `documents`: path of a shard, row in it


@dataclass(frozen=True)
class GeneratorContext:
    """limits, unsafe: of the sandbox. documents: by item number, for generators that read documents."""

    limits: SandboxLimits
    unsafe: bool
    documents: Mapping[int, SourceDocument] = field(default_factory=dict)


class ItemAnswer(NamedTuple):
    """A teacher's answer to the prompt of an item, the seed of the request, and its cost in dollars."""

    item: Item
    text: str
    seed: int
    cost: float


@dataclass
class VerifiedAnswer:
    """The document made from an answer, or the answer itself if no document could be made.

    reason: reason of rejection, '' if accepted. detail: an explanation of it. failure: engine or budget, if a further
    request of the verifier failed. cost: dollars of such requests. meta: provenance of the document.
    """

    text: str
    reason: str = ""
    detail: str = ""
    verifier: str = ""
    cost: float = 0.0
    failure: str = ""
    meta: dict[str, str] = field(default_factory=dict)


class ItemGenerator(ABC):
    """One generator of a recipe."""

    @abstractmethod
    def check(self, inputs: Collection[str]) -> None:
        """Raises RecipeError if one of the step's `inputs` or a package is missing, or if a task is unknown."""


class ProceduralGenerator(ItemGenerator):
    """Generates items without a teacher."""

    @abstractmethod
    def make(self, item: Item) -> FinishedItem:
        """The finished item, accepted or rejected."""


class TeacherGenerator(ItemGenerator):
    """Generates items from a teacher's answers."""

    @abstractmethod
    def prompt(self, item: Item) -> str:
        """The prompt for the teacher. Records its origin in the item's `meta` and `facts`.

        Any exception rejects only this item.
        """

    @abstractmethod
    def verify(self, answers: Sequence[ItemAnswer], query: Query) -> list[VerifiedAnswer]:
        """The verification result of each answer. query: sends further requests."""
