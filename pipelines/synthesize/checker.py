"""Runs inside the sandbox: scores answers, one line of `checks.jsonl` at a time, and prints a line for each.

What a teacher wrote is read by sympy and by tasks' own scorers, which evaluate parts of it as Python: so both work
where that can do no harm, and each check in a process of its own with its own limits, so that a number too large to
compute costs seconds and one check, whatever it keeps the interpreter from doing meanwhile.
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

SECONDS = 2.0  # of CPU for a check; those of honest answers take a tenth of one
_DRAWING = 30.0  # of CPU to make a task again, which is ours: the slowest take ten
_BY_THE_CLOCK = 60.0  # for all of it, where it waits for something instead of computing
_MEMORY = 2 << 30  # bytes of address space, of which the libraries take a quarter

Check = Callable[[], bool]


def prepared(wanted: dict[str, Any]) -> Check:
    """The check, ready to read the answer. maths: whether two answers are the same; gym: whether the task gives full
    marks."""
    if wanted["kind"] == "gym":
        from moray.pipelines.synthesize.gym_tasks import scorer

        score = scorer(wanted["task"], wanted["level"], wanted["seed"])
        return lambda: score(wanted["answer"]) >= 1.0
    return lambda: _same(wanted["gold"], wanted["answer"])


def _same(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    # Their own limits are alarms, which a long multiplication does not hear.
    read = [parse(f"\\boxed{{{one}}}", parsing_timeout=None) for one in (gold, answer)]
    return bool(read[0] and read[1] and verify(read[0], read[1], timeout_seconds=None))


def load_request(kinds: set[str]) -> None:
    """Imports what checks need, once for all of them."""
    if "gym" in kinds:
        import reasoning_gym  # noqa: F401
    if "maths" in kinds:
        import math_verify  # noqa: F401


def check_answer(wanted: dict[str, Any]) -> tuple[bool, str]:
    """(whether it holds, why it could not be found out), from a child whose limits are its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _child(wanted, writer)
    os.close(writer)
    said = _read(reader)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # nor does anything that it started outlive it
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        good, detail = json.loads(said)
    except ValueError:
        number = -code if code < 0 else 0
        if number in (signal.SIGPROF, signal.SIGKILL):
            return False, f"it takes more than {SECONDS:.0f} s"
        return False, f"it ended by {signal.Signals(number).name}" if number else f"it left with code {code}"
    return bool(good), str(detail)


def _read(reader: int) -> bytes:
    """What the child says, until it ends or its time does."""
    said = b""
    with open(reader, "rb", buffering=0) as file:
        while select.select([file], [], [], _BY_THE_CLOCK)[0] and (data := file.read(1 << 16)):
            said += data
    return said


def _child(wanted: dict[str, Any], writer: int) -> None:
    """The check and its words; does not return."""
    try:
        os.setpgid(0, 0)
        signal.setitimer(signal.ITIMER_PROF, _DRAWING)
        check = prepared(wanted)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY if hard < 0 else min(_MEMORY, hard), hard))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        found = check(), ""
    except MemoryError:
        found = False, "it takes more memory than a check may have"
    except BaseException as error:
        found = False, f"{type(error).__name__}: {error}"[:200]
    os.write(writer, json.dumps(found).encode())
    os._exit(0)


def main(mark: str) -> None:
    with open("checks.jsonl", encoding="utf-8") as file:
        checks = [json.loads(line) for line in file]
    load_request({wanted["kind"] for wanted in checks})
    for number, wanted in enumerate(checks):
        print(mark + json.dumps([number, *check_answer(wanted)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
