"""Documents from questions and answers, in several phrasings, with worked steps if the task's metadata provides them.

Steps are computed from the task's metadata. Without such metadata, the answer directly follows the question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

Metadata = Mapping[str, Any]

PHRASINGS = (
    "Question: {question}\n\n{steps}Answer: {answer}\n",
    "Problem.\n{question}\n\nSolution.\n{steps}The answer is {answer}\n",
    "Q: {question}\n\nA: {steps}{answer}\n",
    "Exercise\n\n{question}\n\nWorked answer\n\n{steps}Answer: {answer}\n",
    "User: {question}\n\nAssistant: {steps}The answer is {answer}\n",
)
_WITH_STEPS = ("Step by step:\n{steps}\n", "Let us work it out.\n{steps}\n", "{steps}\n", "Here is how:\n{steps}\n")


def chain_document(question: str, steps: str, answer: str, seed: int) -> str:
    """The question, steps and answer in one of the phrasings, chosen by seed."""
    generator = random.Random(seed)
    phrasing, lead = generator.choice(PHRASINGS), generator.choice(_WITH_STEPS)
    worked = lead.format(steps=steps) if steps else ""
    return phrasing.format(question=question.strip(), steps=worked, answer=answer.strip())


def steps(task: str, metadata: Metadata) -> str:
    """The worked steps from the question to the answer; '' if the metadata does not provide them."""
    if task == "gsm_symbolic":
        return re.sub(r"\n?####.*", "", str(metadata["answer_cot"])).strip()
    make = _STEPS.get(task)
    return "\n".join(make(metadata)) if make else ""


def _chain_sum(metadata: Metadata) -> list[str]:
    terms = str(metadata["expression"]).split()
    total, lines = int(terms[0]), []
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        following = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {following}")
        total = following
    return lines


def _leg_counting(metadata: Metadata) -> list[str]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines, total = [], 0
    for animal, count in metadata["animals"].items():
        legs = ANIMALS[animal]
        total += legs * count
        lines.append(f"{count} x {legs} legs ({animal}) = {legs * count}")
    return [*lines, f"Together: {total}"]


def _gcd(metadata: Metadata) -> list[str]:
    numbers = list(metadata["numbers"])
    common, lines = int(numbers[0]), []
    for number in map(int, numbers[1:]):
        a, b = max(common, number), min(common, number)
        while b:
            lines.append(f"{a} = {a // b} x {b} + {a % b}")
            a, b = b, a % b
        common = a
        lines.append(f"The greatest common divisor so far is {common}.")
    return lines


def _factors(metadata: Metadata) -> list[str]:
    left, lines = int(metadata["number"]), []
    for factor in metadata["factors"]:
        lines.append(f"{left} / {factor} = {left // factor}")
        left //= factor
    return lines


def _number_sorting(metadata: Metadata) -> list[str]:
    words = list(metadata["sorted_words"])
    return [f"{place}. {word}" for place, word in enumerate(words, 1)]


_STEPS: dict[str, Callable[[Metadata], list[str]]] = {
    "chain_sum": _chain_sum,
    "leg_counting": _leg_counting,
    "gcd": _gcd,
    "prime_factorization": _factors,
    "word_sorting": _number_sorting,
}
