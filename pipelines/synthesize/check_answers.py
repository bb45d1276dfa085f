"""Checks answers in batches in the sandbox: mathematics against another answer, tasks by their own scorers."""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moray.actors.sandbox.limits import SandboxLimits
from moray.actors.sandbox.run import run_program

Check = dict[str, Any]
_SECONDS_EACH = 12  # per check, for the whole batch; the checker also limits each check
_CHECKER = Path(__file__).with_name("checker.py")


@dataclass(frozen=True)
class CheckResult:
    passed: bool
    detail: str = ""


def same_maths(gold: str, answer: str) -> Check:
    return {"kind": "maths", "gold": gold, "answer": answer}


def full_marks(task: str, level: int, seed: int, answer: str) -> Check:
    return {"kind": "gym", "task": task, "level": level, "seed": seed, "answer": answer}


def check_all(checks: Sequence[Check], unsafe: bool) -> list[CheckResult]:
    """A result for each check. If a check exceeds a limit of the batch, it fails and the later checks run again."""
    found: list[CheckResult] = []
    while len(found) < len(checks):
        part = checks[len(found) :]
        results, problem = _check_batch(part, unsafe)
        found += results
        if len(results) < len(part):
            found.append(CheckResult(False, f"the verifier ended: {problem}"))
    return found


def _check_batch(checks: Sequence[Check], unsafe: bool) -> tuple[list[CheckResult], str]:
    mark = f"{secrets.token_hex(8)}:"
    limits = SandboxLimits(
        seconds=30 + _SECONDS_EACH * len(checks),
        cpu_seconds=30 + _SECONDS_EACH * len(checks),
        memory_bytes=4 << 30,
        processes=256,
        open_files=256,
        output_bytes=1 << 20,
    )
    files = {"checker.py": _CHECKER.read_text(), "checks.jsonl": "".join(json.dumps(one) + "\n" for one in checks)}
    ended = run_program(files, ["checker.py", mark], limits, unsafe, _packages())
    lines = [line.partition(mark)[2] for line in ended.output.splitlines() if mark in line]
    results = [CheckResult(bool(passed), str(detail)) for _, passed, detail in map(json.loads, lines)]
    return results, ended.exceeded or f"exit code {ended.exit_code}: {ended.output[-200:]}"


def _packages() -> list[str]:
    """Folders with the packages that the checker imports."""
    specs = (importlib.util.find_spec(name) for name in ("moray", "math_verify", "reasoning_gym", "sympy"))
    origins = [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]
    return sorted({str(one.parent if one.name == "moray.py" else one.parent.parent) for one in origins})


def majority(count: int, pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(index of the most common answer, number of answers equal to it, including itself). Ties go to the lowest index.

    pairs: indices of equal answers. Equality need not be transitive, so it is counted for each answer.
    """
    votes = [1] * count
    for one, other in pairs:
        votes[one] += 1
        votes[other] += 1
    best = max(range(count), key=lambda at: (votes[at], -at))
    return best, votes[best]
