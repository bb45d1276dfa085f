"""Problems that the teacher writes and solves, accepted if independent solutions agree on the answer.

Self-consistency (Wang et al. 2022, arXiv 2203.11171): the answer of a problem is the most common one of its solutions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from itertools import combinations
from typing import NamedTuple

from moray.pipelines.synthesize.check_answers import check_all, majority, same_maths
from moray.pipelines.synthesize.config import Maths
from moray.pipelines.synthesize.generators.generator import (
    GeneratorContext,
    ItemAnswer,
    Query,
    TeacherGenerator,
    VerifiedAnswer,
)
from moray.pipelines.synthesize.gym_tasks import need_packages
from moray.pipelines.synthesize.items import Item
from moray.pipelines.synthesize.prompts import READERS, boxed, solve
from moray.pipelines.synthesize.teacher import Answer

_SETTINGS = (
    "in a kitchen", "on a farm", "in a workshop", "on a journey", "at a market", "in a laboratory", "at sea",
    "in a school", "in a library", "at a building site", "in a hospital", "with pure numbers",
)  # fmt: skip


class SolvedProblem(NamedTuple):
    """answer: the boxed answer at the end of the solution."""

    problem: str
    solution: str
    answer: str


class MathsGenerator(TeacherGenerator):
    def __init__(self, config: Maths, context: GeneratorContext) -> None:
        self._config, self._unsafe = config, context.unsafe

    def check(self, inputs: Collection[str]) -> None:
        need_packages("math_verify", "reasoning_gym")

    def prompt(self, item: Item) -> str:
        topic = self._config.topics[item.number % len(self._config.topics)]
        item.meta["topic"] = topic
        generator = random.Random(item.seed)
        return (
            f"Write one mathematics problem about {topic}, {generator.choice(_SETTINGS)}, {generator.choice(READERS)}, "
            "whose answer is one number. Then solve it step by step.\nUse exactly this form:\nProblem: the problem\n"
            "Solution: the steps, ending with \\boxed{the number}"
        )

    def verify(self, answers: Sequence[ItemAnswer], query: Query) -> list[VerifiedAnswer]:
        """Requests `votes` more solutions of each problem, whose first solution must have the majority answer."""
        votes, form = self._config.votes, "not a problem and a solution with \\boxed{}"
        results = [VerifiedAnswer(answer.text, "form", form) for answer in answers]
        problems = {at: found for at, answer in enumerate(answers) if (found := read_problem(answer.text))}
        replies = query(
            [(solve(one.problem), answers[at].seed + vote + 1) for at, one in problems.items() for vote in range(votes)]
        )
        ballots: dict[int, list[str]] = {}
        for place, (at, one) in enumerate(problems.items()):
            own = replies[place * votes : (place + 1) * votes]
            results[at] = VerifiedAnswer(f"Problem: {one.problem}\n\nSolution: {one.solution}\n", cost=_cost(own))
            results[at].failure = next((reply.failure for reply in own if reply.failure in ("engine", "budget")), "")
            if not results[at].failure:
                ballots[at] = [one.answer, *(box for reply in own if (box := boxed(reply.text)))]
        self._count_votes({at: results[at] for at in ballots}, ballots)
        return results

    def _count_votes(self, results: dict[int, VerifiedAnswer], ballots: dict[int, list[str]]) -> None:
        """Sets reason and answer of all results, in one batch of checks. The first vote is the original answer."""
        pairs = {at: list(combinations(range(len(ballot)), 2)) for at, ballot in ballots.items()}
        checks = [same_maths(ballots[at][i], ballots[at][j]) for at, own in pairs.items() for i, j in own]
        checked = iter(check_all(checks, self._unsafe))
        total = 1 + self._config.votes
        for at, result in results.items():
            equal = [pair for pair in pairs[at] if next(checked).passed]
            place, votes = majority(len(ballots[at]), equal)
            answer, share = ballots[at][place], votes / total
            result.verifier = "math-verify, self-consistency"
            result.meta |= {"answer": answer, "agreement": f"{share:.2f}"}
            if (place and (0, place) not in equal) or share < self._config.agree:
                result.reason, result.detail = "disagreement", f"{votes} of {total} solutions have {answer!r}"


def read_problem(answer: str) -> SolvedProblem | None:
    """The parts of an answer in the requested format; None for any other answer."""
    found = re.search(r"Problem:\s*(.+?)\s*^Solution:\s*(.+)", answer, re.DOTALL | re.MULTILINE)
    if found is None or (box := boxed(found[2])) is None:
        return None
    return SolvedProblem(found[1].strip(), found[2].strip(), box)


def _cost(answers: Sequence[Answer]) -> float:
    return sum(answer.cost for answer in answers)
