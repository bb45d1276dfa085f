"""Functions with tests, written by the teacher and verified in the sandbox."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from moray.actors.sandbox.run import run_tests
from moray.pipelines.synthesize.config import Code
from moray.pipelines.synthesize.generators.generator import (
    GeneratorContext,
    ItemAnswer,
    Query,
    TeacherGenerator,
    VerifiedAnswer,
)
from moray.pipelines.synthesize.items import Item
from moray.pipelines.synthesize.program_document import blocks, program_document
from moray.pipelines.synthesize.prompts import READERS


class CodeGenerator(TeacherGenerator):
    def __init__(self, config: Code, context: GeneratorContext) -> None:
        self._config, self._limits, self._unsafe = config, context.limits, context.unsafe

    def check(self, inputs: Collection[str]) -> None:
        """This generator needs no input, package or task."""

    def prompt(self, item: Item) -> str:
        topic = self._config.topics[item.number % len(self._config.topics)]
        item.meta["topic"] = topic
        readers, variation = random.Random(item.seed).choice(READERS), item.seed % 1000
        return (
            f"Invent a small programming task about {topic}, {readers} (variation {variation}). "
            "Answer in three parts: one paragraph that describes the task; then a ```python block with the function "
            "that solves it, using the standard library only; then a second ```python block with at least three assert "
            "statements that test it."
        )

    def verify(self, answers: Sequence[ItemAnswer], query: Query) -> list[VerifiedAnswer]:
        """Accepts answers whose tests pass in the sandbox."""
        return [self._verify_one(answer.text) for answer in answers]

    def _verify_one(self, answer: str) -> VerifiedAnswer:
        parts = read_code(answer)
        if parts is None:
            return VerifiedAnswer(answer, "form", "not a task and two Python blocks")
        task, program, tests = parts
        result = run_tests(program, tests, self._limits, self._unsafe)
        reason = "" if result.passed else f"sandbox:{result.outcome}"
        return VerifiedAnswer(program_document(task, program, tests), reason, result.detail, "sandbox")


def read_code(answer: str) -> tuple[str, str, str] | None:
    """(task, program, tests) of an answer in the requested format; None for any other answer."""
    found = blocks(answer if answer.endswith("\n") else answer + "\n")
    task = answer.partition("```")[0].strip()
    return (task, found[0], found[1]) if len(found) >= 2 and task else None
