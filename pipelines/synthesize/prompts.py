"""Shared parts of prompts: the reader, the request for a solution, and the boxed answer."""

from __future__ import annotations

import re

READERS = ("for a child of ten", "for a pupil of fourteen", "for a student")
_BOX = re.compile(r"\\boxed\s*\{")


def solve(question: str) -> str:
    return f"{question.strip()}\n\nReason step by step, and put the final answer in \\boxed{{}}."


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{}; None if there is none."""
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
