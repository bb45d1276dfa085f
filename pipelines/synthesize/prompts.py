"""What the teacher is asked, and how its answers are read."""

from __future__ import annotations

import random
import re

from moray.pipelines.synthesize.programs import blocks

REPHRASE = {
    "faq": "Turn the text below into questions that a reader might ask, each with a full answer from the text.",
    "table": "Put the facts of the text below into a Markdown table, and say in a paragraph below it what it shows.",
    "tutorial": "Rewrite the text below as a tutorial that teaches its subject step by step, with explanations.",
    "maths": "Write a word problem with numbers about the subject of the text below, and solve it step by step.",
}
_ONLY = "Use only what the text says. Answer with the result alone.\n\nText:\n"
_LEVELS = ("for a child of ten", "for a pupil of fourteen", "for a student")
_SETTINGS = (
    "in a kitchen", "on a farm", "in a workshop", "on a journey", "at a market", "in a laboratory", "at sea",
    "in a school", "in a library", "at a building site", "in a hospital", "with pure numbers",
)  # fmt: skip
_BOX = re.compile(r"\\boxed\s*\{")


def rephrase(style: str, text: str) -> str:
    return f"{REPHRASE[style]} {_ONLY}{text}"


def write_problem(topic: str, seed: int) -> str:
    generator = random.Random(seed)
    return (
        f"Write one mathematics problem about {topic}, {generator.choice(_SETTINGS)}, {generator.choice(_LEVELS)}, "
        "whose answer is one number. Then solve it step by step.\nUse exactly this form:\nProblem: the problem\n"
        "Solution: the steps, ending with \\boxed{the number}"
    )


def solve(question: str) -> str:
    return f"{question.strip()}\n\nReason step by step, and put the final answer in \\boxed{{}}."


def write_code(topic: str, seed: int) -> str:
    generator = random.Random(seed)
    return (
        f"Invent a small programming task about {topic}, {generator.choice(_LEVELS)} (variation {seed % 1000}). Answer "
        "in three parts: one paragraph that describes the task; then a ```python block with the function that solves "
        "it, using the standard library only; then a second ```python block with at least three assert statements "
        "that test it."
    )


def read_problem(answer: str) -> tuple[str, str] | None:
    """(problem, solution) of an answer in the form that was asked for."""
    found = re.search(r"Problem:\s*(.+?)\s*^Solution:\s*(.+)", answer, re.DOTALL | re.MULTILINE)
    if found is None or boxed(found[2]) is None:
        return None
    return found[1].strip(), found[2].strip()


def read_code(answer: str) -> tuple[str, str, str] | None:
    """(task, program, tests)."""
    found = blocks(answer if answer.endswith("\n") else answer + "\n")
    task = answer.partition("```")[0].strip()
    return (task, found[0], found[1]) if len(found) >= 2 and task else None


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{}."""
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at].strip() or None
    return None
