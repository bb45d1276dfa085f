"""The format of a document with a program: the task, the program, and its tests."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def program_document(task: str, code: str, tests: str) -> str:
    return f"{task.strip()}\n\n```python\n{code.strip()}\n```\n\nTests:\n\n```python\n{tests.strip()}\n```\n"


def blocks(text: str) -> list[str]:
    """The Python blocks of a text, in order."""
    return _BLOCK.findall(text)
