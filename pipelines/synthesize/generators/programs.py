"""Collected programs with example inputs and outputs, which are generated and checked in the sandbox.

The collection (reasoning-gym's codeio, 5,752 programs with input generators) was written by a model from third-party
code, so it runs only in the sandbox. One run draws inputs and records outputs. A second, fresh run must give the same
outputs before they become tests of a document.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Collection
from typing import Any

from moray.actors.sandbox.limits import SandboxLimits
from moray.actors.sandbox.run import SandboxResult, run_tests
from moray.pipelines.synthesize.config import Programs
from moray.pipelines.synthesize.generators.generator import GeneratorContext, ProceduralGenerator
from moray.pipelines.synthesize.gym_tasks import need_packages
from moray.pipelines.synthesize.items import FinishedItem, Item, finish, reject
from moray.pipelines.synthesize.program_document import blocks, program_document

# Runs after the program: prints up to `wanted` (inputs, output) pairs that JSON represents exactly.
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
assert _seen, "no input gives an output that JSON can represent"
print("\\n{mark}" + _json.dumps(_seen))
"""


class ProgramGenerator(ProceduralGenerator):
    """One program per item, chosen by the item's seed."""

    def __init__(self, config: Programs, context: GeneratorContext) -> None:
        self._config, self._limits, self._unsafe = config, context.limits, context.unsafe

    def check(self, inputs: Collection[str]) -> None:
        need_packages("reasoning_gym")

    def make(self, item: Item) -> FinishedItem:
        """Accepted if a second run of the program gives the recorded outputs."""
        collected = _collection()
        place = item.seed % len(collected)
        record = collected[place]
        item.meta |= {"program": f"codeio/{place}"}
        item.facts["question"] = record["task_description"]
        tests, drawn = _examples(record, item.seed, self._config.examples, self._limits, self._unsafe)
        if not tests:
            return reject(item, f"sandbox:{drawn.outcome}", drawn.detail, verifier="sandbox")
        text = program_document(record["task_description"], record["code_sample"], tests)
        found = blocks(text)
        if len(found) != 2:
            return reject(item, "form", "the program contains a code fence", text)
        result = run_tests(found[0], found[1], self._limits, self._unsafe)
        if not result.passed:
            return reject(item, f"sandbox:{result.outcome}", result.detail, text, "sandbox")
        return finish(item, text, "sandbox", "passed")


@functools.cache
def _collection() -> list[dict[str, Any]]:
    from reasoning_gym.data import get_data_file_path

    with gzip.open(get_data_file_path("codeio.jsonl.gz"), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _examples(
    record: dict[str, Any], seed: int, wanted: int, limits: SandboxLimits, unsafe: bool
) -> tuple[str, SandboxResult]:
    """Tests for one program ('' if there are none), and the result of the run that drew them."""
    mark = f"examples-{seed}:"
    code = f"from random import Random\n{record['code_sample']}\n\n{record['input_generator']}\n"
    result = run_tests(code, _DRAW.format(seed=seed, wanted=wanted, mark=mark), limits, unsafe)
    _, found, drawn = result.output.rpartition(mark)
    if not result.passed or not found:
        return "", result
    lines = [f"assert main_solution(**{inputs!r}) == {output!r}" for inputs, output in json.loads(drawn)]
    return "\n".join(lines) + "\n", result
