"""reasoning-gym's collected programs as code documents: what is asked, the program, and tests that hold.

The collection (codeio, 5,752 programs with generators of their inputs) was written by a model from code of others, so
nothing of it runs outside the sandbox: there inputs are drawn and outputs recorded, and a second, fresh run has to
give the same outputs before the pair becomes a document.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
from typing import Any

from moray.actors.sandbox.limits import SandboxLimits
from moray.actors.sandbox.run import SandboxResult, run_tests

# Runs after the program: prints up to `wanted` (inputs, output) pairs that JSON can carry to the last digit.
_DRAW = """
import json as _json
from random import Random as _Random
_seen, _random = [], _Random({seed})
for _ in range(4 * {wanted}):
    _inputs = _json.loads(_json.dumps(generate_inputs(_random)))
    _output = main_solution(**_json.loads(_json.dumps(_inputs)))
    if _json.loads(_json.dumps(_output)) == _output and _inputs not in [one[0] for one in _seen]:
        _seen.append([_inputs, _output])
    if len(_seen) == {wanted}:
        break
assert _seen, "no input gives an output that can be written down"
print("\\n{mark}" + _json.dumps(_seen))
"""
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@functools.cache
def collection() -> list[dict[str, Any]]:
    from reasoning_gym.data import get_data_file_path

    with gzip.open(get_data_file_path("codeio.jsonl.gz"), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def examples(
    record: dict[str, Any], seed: int, wanted: int, limits: SandboxLimits, unsafe: bool
) -> tuple[str, SandboxResult]:
    """Tests for one program ('' if it has none), and how drawing them ended."""
    mark = f"examples-{seed}:"
    code = f"from random import Random\n{record['code_sample']}\n\n{record['input_generator']}\n"
    verdict = run_tests(code, _DRAW.format(seed=seed, wanted=wanted, mark=mark), limits, unsafe)
    _, found, drawn = verdict.output.rpartition(mark)
    if not verdict.passed or not found:
        return "", verdict
    lines = [f"assert main_solution(**{inputs!r}) == {output!r}" for inputs, output in json.loads(drawn)]
    return "\n".join(lines) + "\n", verdict


def program_document(task: str, code: str, tests: str) -> str:
    """What is asked, the program, its tests: the form of every code document."""
    return f"{task.strip()}\n\n```python\n{code.strip()}\n```\n\nTests:\n\n```python\n{tests.strip()}\n```\n"


def blocks(text: str) -> list[str]:
    """The Python blocks of a text, in order."""
    return _BLOCK.findall(text)
