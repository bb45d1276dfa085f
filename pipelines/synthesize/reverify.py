"""Verifies a folder of synthetic documents again, from the documents alone: `reverify(folder)`.

Also a command: `python -m moray.pipelines.synthesize.reverify FOLDER`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moray.actors.sandbox.limits import SandboxLimits
from moray.actors.sandbox.run import run_tests
from moray.pipelines.shared.documents import read_shard, shard_paths
from moray.pipelines.synthesize.check_answers import Check, check_all, full_marks, same_maths
from moray.pipelines.synthesize.gym_tasks import draw, score_answer
from moray.pipelines.synthesize.program_document import blocks
from moray.pipelines.synthesize.prompts import boxed

_BATCH = 64


@dataclass
class Reverified:
    """verified: number of documents by verifier. failed: reason by document id. unverifiable: number of documents."""

    verified: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unverifiable: int = 0


def reverify(folder: Path, limits: SandboxLimits | None = None, unsafe: bool = False) -> Reverified:
    """Runs code with its tests, regenerates tasks and scores their answers, and compares mathematics.

    Rephrasings cannot be verified.
    """
    found = Reverified()
    for path in shard_paths(folder):
        table = read_shard(path, ["id", "text", "meta"])
        rows = list(zip(*(table[name].to_pylist() for name in ("id", "text", "meta")), strict=True))
        for begin in range(0, len(rows), _BATCH):
            batch = [(name, text, dict(meta)) for name, text, meta in rows[begin : begin + _BATCH]]
            _batch(batch, found, limits or SandboxLimits(), unsafe)
    return found


def _batch(rows: list[tuple[str, str, dict[str, str]]], found: Reverified, limits: SandboxLimits, unsafe: bool) -> None:
    later: list[tuple[str, str, Check]] = []
    for name, text, meta in rows:
        verifier = meta.get("verifier", "")
        if verifier == "sandbox":
            _note(found, name, verifier, _code(text, limits, unsafe))
        elif verifier == "reasoning-gym":
            check = full_marks(meta["task"], int(meta["level"]), int(meta["seed"]), meta["answer"])
            trusted = "model" not in meta  # the task's own answer is safe to score outside the sandbox
            if problem := _mismatch(text, meta):
                _note(found, name, verifier, problem)
            elif trusted:
                passed = score_answer(check["task"], check["level"], check["seed"], check["answer"]) >= 1.0
                _note(found, name, verifier, "" if passed else "not the full score")
            else:
                later.append((name, verifier, check))
        elif verifier.startswith("math-verify"):
            later.append((name, verifier, same_maths(meta["answer"], boxed(text) or "")))
        else:
            found.unverifiable += 1
    checks = check_all([check for _, _, check in later], unsafe)
    for (name, verifier, _), checked in zip(later, checks, strict=True):
        _note(found, name, verifier, "" if checked.passed else checked.detail or "different answer")


def _code(text: str, limits: SandboxLimits, unsafe: bool) -> str:
    parts = blocks(text)
    if len(parts) != 2:
        return "not a program with tests"
    result = run_tests(parts[0], parts[1], limits, unsafe)
    return "" if result.passed else f"{result.outcome}: {result.detail}"


def _mismatch(text: str, meta: dict[str, str]) -> str:
    """'' if the document has the question of its task and ends with the verified answer, else the difference."""
    entry, _ = draw(meta["task"], int(meta["level"]), int(meta["seed"]))
    if entry["question"].strip() not in text:
        return "different question"
    return "" if text.rstrip().endswith(meta["answer"].strip()) else "different answer"


def _note(found: Reverified, name: str, verifier: str, problem: str) -> None:
    if problem:
        found.failed[name] = problem
    else:
        found.verified[verifier] = found.verified.get(verifier, 0) + 1


def main(output: Callable[[str], object] = print) -> int:
    found = reverify(Path(sys.argv[1]), unsafe="--unsafe-sandbox" in sys.argv[2:])
    for verifier, count in sorted(found.verified.items()):
        output(f"{count} documents verified: {verifier}")
    output(f"{found.unverifiable} documents cannot be verified")
    for name, problem in sorted(found.failed.items()):
        output(f"FAILED {name}: {problem}")
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
