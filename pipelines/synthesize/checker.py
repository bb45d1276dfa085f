"""Runs inside the sandbox: scores the answers in `checks.jsonl` and prints one line for each.

sympy and the tasks' own scorers evaluate parts of a teacher's answer as Python, so they run in the sandbox. Each check
runs in its own process with its own limits: a number too large to compute costs a few seconds and one check, even if
the interpreter does not respond meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

SECONDS = 2.0  # of CPU for a check; ordinary answers take a tenth of a second
_DRAWING = 30.0  # of CPU to regenerate a task, which is trusted code: the slowest take ten
_WALL_SECONDS = 60.0  # for the whole check, in case it waits instead of computing
_MEMORY = 2 << 30  # bytes of address space; the libraries take a quarter

Check = Callable[[], bool]


def prepared(check: dict[str, Any]) -> Check:
    """The check, as a function that evaluates the answer. maths: whether two answers are equal; gym: whether the task
    gives the full score."""
    if check["kind"] == "gym":
        from moray.pipelines.synthesize.gym_tasks import scorer

        score = scorer(check["task"], check["level"], check["seed"])
        return lambda: score(check["answer"]) >= 1.0
    return lambda: _same(check["gold"], check["answer"])


def _same(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    # math-verify's own time limits use alarms, which do not interrupt a long multiplication.
    parsed = [parse(f"\\boxed{{{one}}}", parsing_timeout=None) for one in (gold, answer)]
    return bool(parsed[0] and parsed[1] and verify(parsed[0], parsed[1], timeout_seconds=None))


def import_libraries(kinds: set[str]) -> None:
    """Imports the libraries of these kinds of checks, once for all checks."""
    if "gym" in kinds:
        import reasoning_gym  # noqa: F401
    if "maths" in kinds:
        import math_verify  # noqa: F401


def check_answer(check: dict[str, Any]) -> tuple[bool, str]:
    """(whether the answer is correct, the error if the check failed to run), from a child process with own limits."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _child(check, writer)
    os.close(writer)
    output = _read(reader)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # ends everything that the child started
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        passed, detail = json.loads(output)
    except ValueError:
        number = -code if code < 0 else 0
        if number in (signal.SIGPROF, signal.SIGKILL):
            return False, "the check exceeds its time limit"
        ending = f"ended by {signal.Signals(number).name}" if number else f"exited with code {code}"
        return False, f"the check {ending}"
    return bool(passed), str(detail)


def _read(reader: int) -> bytes:
    """The output of the child, until it ends or its time is up."""
    output = b""
    with open(reader, "rb", buffering=0) as file:
        while select.select([file], [], [], _WALL_SECONDS)[0] and (data := file.read(1 << 16)):
            output += data
    return output


def _child(check: dict[str, Any], writer: int) -> None:
    """Runs the check and writes its result to the pipe. Does not return."""
    try:
        os.setpgid(0, 0)
        signal.setitimer(signal.ITIMER_PROF, _DRAWING)
        run_check = prepared(check)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY if hard < 0 else min(_MEMORY, hard), hard))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        found = run_check(), ""
    except MemoryError:
        found = False, "the check exceeds its memory limit"
    except BaseException as error:
        found = False, f"{type(error).__name__}: {error}"[:200]
    os.write(writer, json.dumps(found).encode())
    os._exit(0)


def main(mark: str) -> None:
    with open("checks.jsonl", encoding="utf-8") as file:
        checks = [json.loads(line) for line in file]
    import_libraries({check["kind"] for check in checks})
    for number, check in enumerate(checks):
        print(mark + json.dumps([number, *check_answer(check)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
