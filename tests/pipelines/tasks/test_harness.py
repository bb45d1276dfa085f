"""The evaluation harness on our engine: equal to its `hf` backend, and the step."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from moray.models import checkpoint
from moray.models.model import DeepseekV3
from moray.models.presets import preset
from moray.pipelines.evaluate.eval_report import EvalReport
from moray.pipelines.serve.async_engine import AsyncEngine
from moray.pipelines.serve.loading import load_engine
from moray.pipelines.serve.openai_api import build_serving_app
from moray.pipelines.tasks.compare import compare_evaluations
from moray.pipelines.tasks.harness_step import EvaluateHarness
from moray.pipelines.tasks.intervals import wilson
from moray.platform.core.errors import InputError
from moray.platform.core.metrics import metric
from moray.platform.core.serve_options import ServeOptions
from tests.loopback import serve_app
from tests.pipelines.serve.chats import TEXT, chat_vocabulary

pytest.importorskip("lm_eval")

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
GROUPED = "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
FILTERED = """
task: spelled
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {do_sample: true, temperature: 1.0, max_gen_toks: 4, until: []}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
BROKEN = [
    ("split", TASK.replace("letters\n", "broken\n").replace("test_split: test", "test_split: nope"), "nope"),
    ("metric", TASK.replace("letters\n", "broken\n").replace("metric: acc", "metric: accc"), "broken has no scores"),
    ("field", TASK.replace("letters\n", "broken\n") + "color: red\n", "color"),
    ("jinja", TASK.replace("letters\n", "broken\n").replace("{{prompt}}", "{{prompt"), "broken cannot be loaded"),
    ("group", "group: broken\ntask: [nobody]\n", "broken cannot be loaded"),
    ("room", FILTERED.replace("spelled\n", "broken\n").replace("max_gen_toks: 4", "max_gen_toks: 9999"), "no room"),
]
LONG = TEXT * 12  # longer than the context


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = chat_vocabulary()._tokenizer
    size = tokenizer.get_vocab_size()
    config = dataclasses.replace(preset("tiny"), vocab_size=size, max_position_embeddings=256, initializer_range=0.1)
    model = DeepseekV3(config)
    model.init_weights(seed=5)
    checkpoint.save(model, folder)
    bos, eos = (tokenizer.id_to_token(index) for index in (0, 1))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backends(folder):
    from lm_eval.models.huggingface import HFLM

    from moray.pipelines.tasks.harness import EngineLM

    ours = EngineLM(load_engine(folder, ServeOptions()))
    return ours, HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=255)


def asked(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_loglikelihoods_are_those_of_the_hf_backend(backends) -> None:
    chance = random.Random(1)
    pieces = [TEXT[start : start + chance.randint(1, 60)] for start in chance.choices(range(len(TEXT)), k=60)]
    pairs = [(one, two) for one, two in zip(pieces[::2], pieces[1::2], strict=True) if one.strip()]
    pairs += [("", "In the"), (TEXT, " "), ("x ", "y"), (LONG, " word"), ("Grüße", " 🙂")]
    ours, theirs = (backend.loglikelihood(asked(*pairs)) for backend in backends)
    for (mine, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert abs(mine - expected) <= 4e-5 * max(1.0, abs(expected))
        assert greedy == expected_greedy


def test_likelihoods_of_long_texts_are_those_of_the_hf_backend(backends) -> None:
    texts = [("In the beginning",), (TEXT,), ("Ü",), (LONG,)]
    ours, theirs = (backend.loglikelihood_rolling(asked(*texts)) for backend in backends)
    assert ours == pytest.approx(theirs, rel=4e-5)


def test_generations_are_those_of_the_hf_backend(backends) -> None:
    prompts = [(text, {"until": ["e"], "max_gen_toks": 24}) for text in ("In the", "def main(", LONG, "name")]
    ours, theirs = (backend.generate_until(asked(*prompts)) for backend in backends)
    assert ours == theirs


def test_a_served_model_has_the_same_loglikelihoods(folder: Path, tmp_path: Path) -> None:
    """By the harness's own client, which asks the server for ids and for log probabilities of prompts."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from moray.pipelines.tasks.harness import EngineLM

    model = shutil.copytree(folder, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(
        json.dumps(settings | {"add_bos_token": True})
    )  # as `export` writes it
    app = build_serving_app(AsyncEngine(load_engine(model, ServeOptions())), "tiny")
    with serve_app(app, log_level="critical") as url:
        client = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions", model="tiny", tokenizer_backend="remote", max_length=256, batch_size=4
        )
        pairs = [("In the", " beginning"), ("def main(", "argument): return 42"), ("Grüße", " 🙂"), ("x", "y")]
        ours, theirs = (
            backend.loglikelihood(asked(*pairs)) for backend in (EngineLM(load_engine(model, ServeOptions())), client)
        )
    for (mine, greedy), (served, served_greedy) in zip(ours, theirs, strict=True):
        assert abs(mine - served) <= 4e-5 * max(1.0, abs(served))
        assert greedy == served_greedy


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "letters.yaml").write_text(TASK)
    items = [{"prompt": f"{n}: In the", "choices": [" word", "beginning", " 🙂"], "answer": n % 3} for n in range(12)]
    (folder / "letters.jsonl").write_text("\n".join(map(json.dumps, items)))
    return folder


def test_a_folder_of_tasks_may_be_relative(folder: Path, tasks: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    report, _ = run(folder, tmp_path / "a", tasks=("letters",), task_folder=Path("tasks"), limit=2)
    assert report.rows


def run(model: Path, out: Path, **config) -> tuple[EvalReport, list]:
    out.mkdir()
    seen: list = []

    def tell(name: str, value: float, **labels: str) -> None:
        assert metric(name)
        seen.append((name, value, labels))

    ctx = SimpleNamespace(
        config=EvaluateHarness.Config(**config),
        inputs={"model": SimpleNamespace(folder=model, reference="artifact:m")},
        cluster=SimpleNamespace(topology=lambda: SimpleNamespace(cpus=1)),
        folder=out, metric=tell, score=lambda *told: seen.append(("score", *told)),
        progress=lambda *told: seen.append(told), counts={}, outcome="",
    )  # fmt: skip
    EvaluateHarness().run(ctx)
    return EvalReport.read(out), seen


def test_the_step_writes_a_report_that_can_be_compared(folder: Path, tasks: Path, tmp_path: Path) -> None:
    report, seen = run(folder, tmp_path / "a", tasks=("letters",), task_folder=tasks)
    (row,) = [row for row in report.rows if row.metric == "acc"]
    assert row.interval == wilson(12 * row.value, 12)
    assert (row.labels, row.n) == ({"task": "letters"}, 12)
    assert row.interval[0] < row.value < row.interval[1]
    assert ("harness_score", row.value, {"task": "letters", "score": "acc"}) in seen
    assert ("score", "letters", "acc", row.value, 12, row.interval) in seen
    assert ("answering", 36, 36, "requests") in seen
    assert "letters" in (tmp_path / "a" / "closing.txt").read_text()
    run(folder, tmp_path / "b", tasks=("letters",), task_folder=tasks)
    found = compare_evaluations(tmp_path / "a", tmp_path / "b")
    assert found["letters", "acc"].n == 12
    assert found["letters", "acc"].difference == 0
    limited, _ = run(folder, tmp_path / "c", tasks=("letters",), task_folder=tasks, limit=5)
    assert limited.rows[0].n == 5
    with pytest.raises(InputError, match="share no task"):
        compare_evaluations(tmp_path / "a", tmp_path / "c")


def test_groups_of_groups_and_filters(folder: Path, tasks: Path, tmp_path: Path) -> None:
    """The harness has a sample for each document and filter, and gives groups the names of their members only."""
    (tasks / "_default_template_yaml").write_text(TASK.replace("task: letters\n", ""))
    (tasks / "more.yaml").write_text("include: _default_template_yaml\ntask: more\n")
    (tasks / "spelled.yaml").write_text(FILTERED)
    (tasks / "inner.yaml").write_text("group: inner\ntask: [letters, more]\n" + GROUPED)
    (tasks / "outer.yaml").write_text("group: outer\ntask: [inner]\n" + GROUPED)
    report, _ = run(folder, tmp_path / "a", tasks=("outer", "spelled"), task_folder=tasks)
    counts = {(row.labels["task"], row.metric): row.n for row in report.rows}
    assert (counts["letters", "acc"], counts["more", "acc"], counts["inner", "acc"], counts["outer", "acc"]) == (
        12, 12, 24, 24,
    )  # fmt: skip
    assert counts["spelled", "exact_match (first)"] == counts["spelled", "exact_match (whole)"] == 12
    run(folder, tmp_path / "b", tasks=("outer", "spelled"), task_folder=tasks)
    found = compare_evaluations(tmp_path / "a", tmp_path / "b")
    assert found["spelled", "exact_match (first)"].n == found["letters", "acc"].n == 12
    assert {one.difference for one in found.values()} == {0.0}  # also of the sampled answers


def test_files_of_a_folder_of_tasks_count_in_the_fingerprint(tasks: Path) -> None:
    config = EvaluateHarness.Config(tasks=("letters",), task_folder=tasks)
    before = EvaluateHarness().external(config)
    assert [file.key for file in before] == ["letters.jsonl", "letters.yaml"]
    (tasks / "letters.yaml").write_text(TASK + "\n")
    assert EvaluateHarness().external(config) != before


def test_mistakes_are_told(folder: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no task leters") as told:
        run(folder, tmp_path / "a", tasks=("leters",), task_folder=tasks)
    assert "letters" in told.value.hint
    for name, content, says in BROKEN:
        (tasks / "broken.yaml").write_text(content)
        with pytest.raises(InputError, match=says):
            run(folder, tmp_path / name, tasks=("broken",), task_folder=tasks)
    for content, says in (("task: [", "line 1"), ("", "no YAML mapping"), ("- a", "no YAML mapping")):
        (tasks / "broken.yaml").write_text(content)
        with pytest.raises(InputError, match=says):
            EvaluateHarness().external(EvaluateHarness.Config(tasks=("broken",), task_folder=tasks))
    (tasks / "broken.yaml").unlink()
    with pytest.raises(InputError, match="is no folder"):
        EvaluateHarness().external(EvaluateHarness.Config(tasks=("x",), task_folder=tasks / "no"))
    (tasks / "letters.jsonl").unlink()
    with pytest.raises(InputError, match=r"data of letters cannot be read: .*letters\.jsonl"):
        run(folder, tmp_path / "b", tasks=("letters",), task_folder=tasks)
    with pytest.raises(InputError, match="data of hellaswag cannot be read") as told:
        run(folder, tmp_path / "c", tasks=("hellaswag",))
    assert "downloads" in told.value.hint
