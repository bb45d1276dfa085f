"""A thousand structured answers of a model with random weights: finished ones are valid, and bounded ones finish."""

from __future__ import annotations

import importlib.resources
import json
from collections import Counter
from typing import Any

import jsonschema
import pytest

from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.grammar import GrammarCompiler, GrammarError, of_schema
from moray.pipelines.serve.sequence import Request
from tests.pipelines.serve.chats import chat_engine, chat_vocabulary

pytestmark = pytest.mark.evidence
MOST = 400  # tokens
ANSWERS = 1000


def record(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    fixed = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return fixed | more


TEXT = {"type": "string", "maxLength": 16}
TOOLS = {
    "weather": record({"city": TEXT, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "maximum": 14}}),
    "search": record({"query": TEXT, "top": {"type": "integer", "minimum": 1, "maximum": 50}}),
    "calendar": record({"day": {"type": "string", "format": "date"}, "title": TEXT, "all_day": {"type": "boolean"}}),
    "route": record({"stops": {"type": "array", "items": TEXT, "minItems": 2, "maxItems": 4}}),
    "matrix": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        "minItems": 1,
        "maxItems": 3,
    },
    "person": record(
        {"name": TEXT, "born": {"type": ["integer", "null"]}, "tags": {"type": "array", "items": TEXT, "maxItems": 3}}
    ),
    "payment": record({"amount": {"type": "number"}, "currency": {"type": "string", "pattern": "^[A-Z]{3}$"}}),
    "choice": {"anyOf": [record({"yes": TEXT}), record({"no": {"type": "integer"}}), {"const": None}]},
    "reference": {"$defs": {"point": record({"x": {"type": "integer"}, "y": {"type": "integer"}})}}
    | record({"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}),
    "identifier": record({"id": {"type": "string", "format": "uuid"}, "at": {"type": "string", "format": "date-time"}}),
}


def vendored() -> dict[str, Any]:
    """Schemas of configuration files, without bounds, that check-jsonschema ships."""
    pytest.importorskip("check_jsonschema", reason="pip install check-jsonschema")
    folder = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    return {one.name: json.loads(one.read_text()) for one in folder.iterdir() if one.name.endswith(".json")}


def test_a_thousand_answers() -> None:
    engine = chat_engine(chat_vocabulary(), context=512)
    compiler = GrammarCompiler(engine.vocabulary)
    schemas, refused = {}, {}
    for name, schema in {**TOOLS, **vendored()}.items():
        try:
            schemas[name] = (schema, compiler.compile(of_schema(schema)))
        except GrammarError as error:
            refused[name] = str(error)
    assert set(TOOLS) <= set(schemas)
    finished, asked = Counter[str](), Counter[str]()
    requests = [(name, seed) for seed in range(ANSWERS) for name in schemas][:ANSWERS]
    for start in range(0, ANSWERS, 16):
        for name, text, ended in answers(engine, schemas, requests[start : start + 16]):
            asked[name] += 1
            if ended:
                finished[name] += 1
                jsonschema.validate(json.loads(text), schemas[name][0])
            else:
                state = schemas[name][1].start()
                for index in engine.vocabulary.encode(text.rstrip("\ufffd")):
                    state.accept(index)
                assert not state.ended
    bounded = sum(finished[name] for name in TOOLS), sum(asked[name] for name in TOOLS)
    print(f"{sum(asked.values())} answers, {sum(finished.values())} finished and valid; bounded: {bounded}")
    print({name: f"{finished[name]}/{asked[name]}" for name in schemas})
    print("refused:", refused)
    assert bounded[0] >= 0.95 * bounded[1]


def answers(engine: Engine, schemas: dict[str, Any], wanted: list[tuple[str, int]]) -> list[tuple[str, str, bool]]:
    sequences = {
        engine.submit(Request((5, 6), max_tokens=MOST, temperature=1.0, seed=seed, grammar=schemas[name][1])): name
        for name, seed in wanted
    }
    texts = dict.fromkeys(sequences, "")
    while engine.busy:
        for output in engine.step():
            assert not isinstance(output.result, Exception), output.result
            texts[output.sequence] += output.result.text
    return [(name, texts[one], one.finish_reason == "stop") for one, name in sequences.items()]
