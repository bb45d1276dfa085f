"""Local tasks: files, scores by the engine, intervals, comparisons, and the step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moray.pipelines.evaluate.eval_report import EvalReport
from moray.pipelines.tasks.compare import compare_evaluations
from moray.pipelines.tasks.intervals import compare_items, wilson
from moray.pipelines.tasks.scoring import answer_items
from moray.pipelines.tasks.step import ITEMS, EvaluateTasks
from moray.pipelines.tasks.task_file import TaskItem, read_task
from moray.platform.core.errors import InputError
from moray.platform.core.metrics import metric
from tests.pipelines.serve.chats import chat_engine, chat_vocabulary

CHOICES = [
    {"id": "1", "prompt": "In the beginning was the", "choices": [" word", " cat.", " Grüße 🙂"], "answer": 0},
    {"prompt": "", "choices": ["a", "In"], "answer": 1},
    {"prompt": "def main(", "choices": ["argument): return 42", "x"], "answer": 0},
]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}},
    "required": ["name"],
    "additionalProperties": False,
}


def write(path: Path, items: list) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n\n")
    return path


@pytest.fixture(scope="module")
def engine():
    return chat_engine(chat_vocabulary(), 256)


def test_scores_of_choices_are_those_of_one_forward(engine) -> None:
    """Against a forward over the whole text, without the engine's batches."""
    vocabulary = engine.vocabulary
    items = [TaskItem.model_validate(item) for item in CHOICES]
    for item, result in zip(items, answer_items(engine, items, 16), strict=True):
        for choice, value in zip(item.choices, result.loglikelihoods, strict=True):
            context, whole = vocabulary.encode(item.prompt), vocabulary.encode(item.prompt + choice)
            ids = [vocabulary.bos, *whole]
            from moray.models.rows import Span

            cache = engine.model.cache(8, 32)
            found = engine.model.forward([Span(ids, 0, list(range(8)), len(ids))], cache)
            logprobs = torch.log_softmax(found.logits_WV[:, : engine.tokens], -1)
            expected = sum(float(logprobs[place, ids[place + 1]]) for place in range(len(context), len(ids) - 1))
            assert math.isclose(value, expected, rel_tol=1e-5)
        assert result.scores["task_accuracy"] == float(result.loglikelihoods[item.answer] == max(result.loglikelihoods))


def test_more_items_than_are_open_at_a_time(engine) -> None:
    items = [TaskItem.model_validate(item) for item in CHOICES] * 40
    results = list(answer_items(engine, items, 16))
    assert [result.item for result in results] == items
    assert {results[place].loglikelihoods for place in range(0, 120, 3)} == {results[0].loglikelihoods}


def test_answers_of_a_schema(engine) -> None:
    items = [TaskItem.model_validate({"prompt": f"person {n}: ", "schema": PERSON}) for n in range(5)]
    for result in answer_items(engine, items, 80):
        assert result.complete
        assert set(json.loads(result.answer)) == {"name"}
    short = list(answer_items(engine, items, 3))
    assert [result.scores for result in short] == [{"task_complete": 0.0}] * 5


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"prompt": "ab" * 400, "choices": ["c"], "answer": 0}, "does not fit the model"),
        ({"prompt": "x", "schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ],
)
def test_items_that_the_model_cannot_answer(engine, item, says) -> None:
    with pytest.raises(InputError, match=says):
        list(answer_items(engine, [TaskItem.model_validate(item)], 16))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "has no items"),
        (["{"], "line 1: not JSON"),
        (['{"prompt": "x", "choices": ["a"], "answer": 0}', '{"prompt": "x"}'], "line 2: .*or schema"),
        (['{"prompt": "x", "choices": ["a"], "answer": 1}'], "index of a choice, 0 to 0"),
        (['{"prompt": "x", "choices": ["a"]}'], "index of a choice"),
        (['{"prompt": "x", "choices": [""], "answer": 0}'], "a choice is empty"),
        (['{"prompt": 5, "choices": ["a"], "answer": 0}'], "prompt: .*valid string"),
        (['{"prompt": "x", "choices": ["a"], "answer": 0, "extra": 1}'], "extra: "),
        (['{"prompt": "x", "choices": ["a"], "answer": 0}', '{"prompt": "x", "schema": {}}'], "items with a schema"),
    ],
)  # fmt: skip
def test_files_that_are_no_tasks(tmp_path: Path, lines: list[str], says: str) -> None:
    (tmp_path / "task.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=says):
        read_task(tmp_path / "task.jsonl")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        EvaluateTasks().external(EvaluateTasks.Config(tasks=(tmp_path / "no.jsonl",)))


@given(st.integers(0, 200), st.integers(1, 200))
def test_intervals_are_those_of_scipy(right: int, n: int) -> None:
    right = min(right, n)
    low, high = wilson(right, n)
    theirs = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert math.isclose(low, theirs.low, abs_tol=1e-6)
    assert math.isclose(high, theirs.high, abs_tol=1e-6)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_comparisons_are_paired(pairs: list[tuple[bool, bool]]) -> None:
    first, second = ([float(pair[k]) for pair in pairs] for k in (0, 1))
    found = compare_items(first, second)
    back = compare_items(second, first)
    assert found.p == back.p
    assert math.isclose(found.difference, -back.difference, abs_tol=1e-12)
    assert found.interval[0] <= found.difference <= found.interval[1]
    tosses = found.only_first + found.only_second
    if tosses:
        assert math.isclose(found.p, stats.binomtest(found.only_first, tosses).pvalue, rel_tol=1e-9)


def test_the_step_writes_a_report_and_every_item(engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moray.pipelines.serve import loading

    monkeypatch.setattr(loading, "load_engine", lambda folder, options: engine)
    tasks = (
        write(tmp_path / "words.jsonl", CHOICES),
        write(tmp_path / "people.jsonl", [{"prompt": "x", "schema": PERSON}]),
    )
    config = EvaluateTasks.Config(tasks=tasks, max_tokens=80)
    assert {file.key for file in EvaluateTasks().external(config)} == {"words", "people"}
    folders: list[Path] = []
    scores: list[tuple] = []

    def note(name: str, value: float, **labels: str) -> None:
        assert metric(name).labels == tuple(labels)

    for number in range(2):
        folder = tmp_path / f"out{number}"
        folder.mkdir()
        context = SimpleNamespace(
            config=config,
            folder=folder,
            inputs={"model": SimpleNamespace(folder=tmp_path, reference="export/aa")},
            cluster=SimpleNamespace(topology=lambda: SimpleNamespace(cpus=1)),
            progress=lambda *_: None,
            metric=note,
            score=lambda *told: scores.append(told),
            counts={},
            outcome="",
        )
        EvaluateTasks().run(context)
        folders.append(folder)
    report = EvalReport.read(folders[0])
    assert {(row.labels["task"], row.metric) for row in report.rows} == {
        ("words", "task_accuracy"), ("words", "task_accuracy_per_byte"), ("people", "task_complete"),
    }  # fmt: skip
    assert report.value("task_complete", task="people") == 1.0
    assert len((folders[0] / ITEMS).read_text().splitlines()) == 4
    assert "words" in (folders[0] / "closing.txt").read_text()
    assert ("people", "complete", 1.0, 1) in [told[:4] for told in scores]
    same = compare_evaluations(*folders)
    assert {one.difference for one in same.values()} == {0.0}
    assert {one.p for one in same.values()} == {1.0}
    EvalReport(model="x", rows=tuple(row.model_copy(update={"data": "other"}) for row in report.rows)).write(folders[1])
    with pytest.raises(InputError, match="share no task"):
        compare_evaluations(*folders)
