"""Runs inside the sandbox: scores answers, one line of `checks.jsonl` at a time, and prints a line for each.

What a teacher wrote is read by sympy and by tasks' own scorers, which evaluate parts of it as Python: so both work
where that can do no harm, and where a number too large to compute ends one check instead of a run.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def check(wanted: dict[str, Any]) -> bool:
    """maths: whether two answers are the same; gym: whether the task gives full marks."""
    if wanted["kind"] == "gym":
        from moray.pipelines.synthesize.gym import score

        return score(wanted["task"], wanted["level"], wanted["seed"], wanted["answer"]) >= 1.0
    from math_verify import parse, verify

    gold, answer = (parse(f"\\boxed{{{wanted[name]}}}") for name in ("gold", "answer"))
    return bool(gold and answer and verify(gold, answer))


def main(mark: str) -> None:
    with open("checks.jsonl", encoding="utf-8") as file:
        checks = [json.loads(line) for line in file]
    for number, wanted in enumerate(checks):
        try:
            good, detail = check(wanted), ""
        except Exception as error:
            good, detail = False, f"{type(error).__name__}: {error}"[:200]
        print(mark + json.dumps([number, good, detail]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
