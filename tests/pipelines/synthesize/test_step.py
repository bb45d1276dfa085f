"""synthesize: its documents verify again, a failure affects only its item, and no finished item is generated twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from moray.actors.sandbox import run as sandbox
from moray.pipelines.shared.documents import document_id, read_shard, write_shard
from moray.pipelines.synthesize import chains, check_answers, checker, gym_tasks, item_copies
from moray.pipelines.synthesize.budget_tracker import LocalBudgetTracker
from moray.pipelines.synthesize.check_answers import check_all, full_marks, majority, same_maths
from moray.pipelines.synthesize.config import Budget, SynthesizeConfig
from moray.pipelines.synthesize.generators.code import read_code
from moray.pipelines.synthesize.generators.maths import read_problem
from moray.pipelines.synthesize.items import FinishedItem, Log
from moray.pipelines.synthesize.produce import WorkDir, produce
from moray.pipelines.synthesize.program_document import blocks, program_document
from moray.pipelines.synthesize.prompts import boxed
from moray.pipelines.synthesize.reverify import reverify
from moray.pipelines.synthesize.step import step, write_copies, write_items
from moray.pipelines.synthesize.teacher import TeacherClient
from moray.platform.core.cluster import Cluster
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.core.home import Home
from moray.platform.plan.recipe import parse_recipe
from moray.platform.run.runner import Runner
from tests.pipelines.synthesize.teacher_server import TeacherServer, teacher_server

needs_sandbox = pytest.mark.skipif(bool(sandbox.refusal()), reason=f"no namespaces here: {sandbox.refusal()}")


@pytest.fixture
def server() -> Iterator[TeacherServer]:
    with teacher_server() as made:
        yield made


def config(url: str = "http://127.0.0.1:9/v1", *generators: dict[str, Any], **more: Any) -> SynthesizeConfig:
    teacher = {"url": url, "model": "sums", "retries": 0, "concurrency": 4, "max_tokens": 64}
    return SynthesizeConfig.model_validate({"generators": list(generators), "teacher": teacher, **more})


@dataclass(frozen=True)
class Work(WorkDir):
    tracker: LocalBudgetTracker


def work(folder: Path, budget: Budget | None = None) -> Work:
    return Work(folder / ".work", LocalBudgetTracker(str(folder / ".work" / "spent.jsonl"), budget or Budget()))


def shard(items: int, **more: Any) -> dict[str, Any]:
    return {"shard": 0, "generator": 0, "begin": 0, "end": items, "documents": [], **more}


def make(
    made: SynthesizeConfig, where: Work, items: int, *, threads: int = 4, **more: Any
) -> tuple[dict[str, FinishedItem], dict[str, Any]]:
    cache = where.folder.parents[1] / "cache"
    assert made.teacher
    connect = partial(TeacherClient, made.teacher, made.budget, where.tracker, cache, threads)
    row = produce(shard(items, **more), made, where, connect)
    return where.log(0).read(), row


def write(made: SynthesizeConfig, where: WorkDir, items: int) -> Path:
    folder = where.folder.parent
    write_copies(where.folder, {})
    write_items(shard(items, log=str(where.log(0).path)), folder, made)
    return folder


# Procedural items


@pytest.mark.parametrize("task", ["chain_sum", "gsm_symbolic", "leg_counting", "gcd", "prime_factorization"])
def test_worked_steps_lead_to_the_answer(task: str) -> None:
    for seed in range(12):
        entry, _ = gym_tasks.draw(task, 2, seed)
        worked = chains.steps(task, entry["metadata"])
        last = worked.splitlines()[-1]
        answer = entry["answer"].split()[-1]
        assert answer in last or (task == "prime_factorization" and last.endswith("= 1")), (entry, worked)


def test_levels_are_harder_and_items_come_again() -> None:
    easy = [gym_tasks.draw("chain_sum", 0, seed)[0]["question"] for seed in range(20)]
    hard = [gym_tasks.draw("chain_sum", 5, seed)[0]["question"] for seed in range(20)]
    assert sum(map(len, hard)) > 1.2 * sum(map(len, easy))
    assert hard == [gym_tasks.draw("chain_sum", 5, seed)[0]["question"] for seed in range(20)]
    assert gym_tasks.draw("survo", 2, 1)[1] < 2, "a level that the task does not have is the nearest below"
    assert len({chains.chain_document("q", "s", "a", seed) for seed in range(60)}) == len(chains.PHRASINGS) * 4


@pytest.mark.heavy
def test_items_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """A process with another hash seed draws the same, for every task that is used: so documents verify anywhere."""
    script = """
import json
from tests.pipelines.synthesize.test_step import questions
print("QUESTIONS" + json.dumps(questions()))
"""
    there = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=there, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.partition("QUESTIONS")[2]) == questions()
    assert len(questions()) > 40


def questions() -> list[list[str]]:
    drawn = [gym_tasks.draw(task, 1, 7) for task in gym_tasks.choose_tasks(["arithmetic", "algorithmic"], True)]
    return [[entry["question"], entry["answer"]] for entry, _ in drawn]


@needs_sandbox
def test_procedural_items_verify_again(tmp_path: Path) -> None:
    for name, generator in {
        "gym": {"kind": "gym", "name": "gym", "tasks": ["arithmetic", "logic"], "items": 24},
        "code": {"kind": "programs", "name": "code", "items": 6},
    }.items():
        made, where = config("http://x/v1", generator), work(tmp_path / name)
        items = generator["items"]
        log, row = make(made, where, items)
        assert len(log) == items
        assert row["accepted"] >= items // 3
        folder = write(made, where, items)
        found = reverify(folder)
        assert not found.failed
        assert sum(found.verified.values()) == row["accepted"]
        table = read_shard(folder / "documents-00000.parquet")
        assert set(table["source"].to_pylist()) == {name}
        for meta in map(dict, table["meta"].to_pylist()):
            assert {"generator", "prompt_hash", "seed", "verifier", "verdict", "cost"} <= set(meta)


@needs_sandbox
def test_a_document_that_was_changed_does_not_verify(tmp_path: Path) -> None:
    made = config("http://x/v1", {"kind": "gym", "name": "gym", "tasks": ["chain_sum"], "items": 3})
    where = work(tmp_path / "run")
    make(made, where, 3)
    folder = write(made, where, 3)
    table = read_shard(folder / "documents-00000.parquet")
    texts = [text.rstrip() + "7\n" for text in table["text"].to_pylist()]
    write_shard(
        folder / "documents-00000.parquet", table.set_column(1, table.field(1), pa.array(texts, pa.large_string()))
    )
    assert len(reverify(folder).failed) == 3


# The teacher


@needs_sandbox
@pytest.mark.heavy
def test_taught_mathematics_verifies_again(tmp_path: Path, server: TeacherServer) -> None:
    kinds: list[dict[str, Any]] = [
        {"kind": "gym", "name": "sums", "tasks": ["chain_sum"], "solver": "teacher", "items": 8},
        {"kind": "maths", "name": "maths", "votes": 3, "items": 8},
    ]
    for kind in kinds:
        made, where = config(server.url, kind, attempts=2), work(tmp_path / kind["name"])
        log, row = make(made, where, 8)
        assert row["accepted"] >= 6, [vars(one) for one in log.values()]
        found = reverify(write(made, where, 8))
        assert not found.failed
        assert sum(found.verified.values()) == row["accepted"]
        assert any(one.meta.get("attempt", "0") > "0" for one in log.values()), "rejection sampling asked again"


@needs_sandbox
def test_of_all_attempts_the_best_or_none(tmp_path: Path, server: TeacherServer) -> None:
    kind = {"kind": "code", "name": "code", "items": 4}
    log, _ = make(config(server.url, kind, attempts=3, pick="best"), work(tmp_path / "best"), 4)
    assert len(server.asked) == 12
    assert all(not one.reason for one in log.values())
    log, _ = make(config(server.url, kind, attempts=1, seed=3), work(tmp_path / "one"), 4)
    wrong = [one for one in log.values() if one.reason]
    assert all(one.reason == "sandbox:failed" and "AssertionError" in one.detail for one in wrong)


def rephrasings(folder: Path, texts: list[str]) -> list[tuple[str, int]]:
    rows = [
        {"id": document_id("s", str(i)), "text": text, "source": "s", "license": "", "meta": []}
        for i, text in enumerate(texts)
    ]
    from moray.pipelines.shared.documents import SCHEMA

    path = folder / "documents-00000.parquet"
    write_shard(path, pa.Table.from_pylist(rows, SCHEMA))
    return [(str(path), row) for row in range(len(texts))]


TEXTS = [f"Number {i}: rivers carry sand, and sand makes bars on which grass grows after a while." for i in range(8)]
FAQ = {"kind": "rephrase", "name": "faq", "items": 8}


def test_a_poisoned_prompt_loses_no_other(tmp_path: Path, server: TeacherServer) -> None:
    texts = [*TEXTS]
    texts[2] += " POISON"
    texts[5] += " GARBAGE"
    documents = rephrasings(tmp_path / "in", texts)
    log, row = make(config(server.url, FAQ, attempts=1), work(tmp_path / "run"), 8, documents=documents)
    assert {key: one.reason for key, one in log.items() if one.reason} == {"faq/2": "prompt", "faq/5": "prompt"}
    assert "not served" in log["faq/2"].detail
    assert row["accepted"] == 6
    assert json.loads(row["unanswered"]) == {}


def test_a_dead_engine_loses_nothing_and_is_asked_again(tmp_path: Path, server: TeacherServer) -> None:
    documents, where = rephrasings(tmp_path / "in", TEXTS), work(tmp_path / "run")
    made = config(server.url, FAQ, attempts=1)
    make(made, where, 4, documents=documents)
    server.down = True
    log, row = make(made, where, 8, documents=documents)
    assert len(log) == 4
    assert json.loads(row["unanswered"]) == {"engine": 4}
    server.down, before = False, len(server.asked)
    log, row = make(made, where, 8, documents=documents)
    assert row["accepted"] == 8
    assert len(server.asked) == before + 4


def test_a_teacher_that_stays_unreachable_ends_the_step(tmp_path: Path, server: TeacherServer) -> None:
    server.down = True
    documents = rephrasings(tmp_path / "in", TEXTS * 5)
    _, row = make(config(server.url, FAQ, attempts=1), work(tmp_path / "run"), 40, documents=documents)
    assert json.loads(row["unanswered"]) == {"engine": 40}
    assert len(server.asked) <= 8 + 4, "what is under way, and no more"


def test_a_budget_is_never_exceeded(tmp_path: Path, server: TeacherServer) -> None:
    documents = rephrasings(tmp_path / "in", TEXTS)
    budget = Budget(tokens=1000)
    where = work(tmp_path / "run", budget)
    made = config(server.url, FAQ, attempts=1, budget=budget.model_dump())
    log, row = make(made, where, 8, documents=documents)
    left = json.loads(row["unanswered"])["budget"]
    assert 0 < left < 8
    assert len(log) == 8 - left
    spent = where.tracker.spent()
    assert spent.prompt_tokens + spent.answer_tokens == 30 * spent.requests <= 1000
    assert LocalBudgetTracker(str(where.folder / "spent.jsonl"), budget).spent() == spent


def test_a_budget_in_dollars_needs_prices() -> None:
    with pytest.raises(ValidationError, match="needs dollars_per_million"):
        Budget(dollars=1.0)


def test_reservations_of_a_killed_run_stay(tmp_path: Path) -> None:
    budget = Budget(dollars=10.0, dollars_per_million_prompt_tokens=1e6, dollars_per_million_answer_tokens=1e6)
    path = str(tmp_path / "spent.jsonl")
    tracker = LocalBudgetTracker(path, budget)
    assert tracker.reserve("a", 2, 4) == ""
    with (tmp_path / "spent.jsonl").open("ab") as file:
        file.write(b'["torn')
    tracker = LocalBudgetTracker(path, budget)
    assert tracker.spent().dollars == 6.0
    assert tracker.reserve("b", 2, 4) == "budget"
    assert tracker.reserve("a", 2, 4) == "", "the same request again is no second one"
    tracker.settle("a", 1, 1)
    assert tracker.reserve("b", 2, 4) == ""


KILLED = """
import json, sys
from pathlib import Path
from tests.pipelines.synthesize.test_step import config, make, work
url, folder, documents = sys.argv[1:]
made = config(url, {"kind": "rephrase", "name": "faq", "items": 8}, attempts=1)
make(made, work(Path(folder)), 8, threads=1, documents=json.loads(documents))
"""


def test_a_rerun_after_a_kill_makes_no_finished_item_again(tmp_path: Path, server: TeacherServer) -> None:
    documents = rephrasings(tmp_path / "in", TEXTS)
    server.hold = 5
    arguments = [server.url, str(tmp_path / "run"), json.dumps(documents)]
    there = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], env=there)
    assert server.holding.wait(120)
    process.kill()
    process.wait()
    asked = [prompt for prompt, _ in server.asked]
    assert len(asked) == 6
    server.hold = None
    made, where = config(server.url, FAQ, attempts=1), work(tmp_path / "run")
    _, row = make(made, where, 8, documents=documents)
    assert row["accepted"] == 8
    again = [prompt for prompt, _ in server.asked][6:]
    assert not set(again) & set(asked[:5]), "an answered prompt was sent again"
    assert len(again) == 3
    before = len(server.asked)
    make(made, where, 8, documents=documents)
    assert len(server.asked) == before


def test_a_log_without_its_last_line_end_is_read(tmp_path: Path) -> None:
    log = Log(tmp_path / "made.jsonl")
    log.add(FinishedItem("a/0", "text\u2028with\nlines", "", "", {"x": "y"}))
    with log.path.open("ab") as file:
        file.write(b'{"key": "a/1", "te')
    assert list(log.read()) == ["a/0"]
    log.add(FinishedItem("a/1", "t", "", "", {}))
    assert list(log.read()) == ["a/0", "a/1"]


def test_a_wrong_model_is_one_clear_error(tmp_path: Path, server: TeacherServer) -> None:
    documents = rephrasings(tmp_path / "in", TEXTS)
    with pytest.raises(InputError, match="refused model"):
        make(config(server.url + "/nowhere", FAQ), work(tmp_path / "run"), 8, documents=documents)


# Checks


@needs_sandbox
def test_answers_are_checked_where_they_do_no_harm(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    checks = [
        same_maths("\\frac{1}{2}", "0.5"),
        same_maths("12", "13"),
        same_maths("1", f"__import__('pathlib').Path({str(trap)!r}).touch()"),
        full_marks("chain_sum", 0, 3, gym_tasks.draw("chain_sum", 0, 3)[0]["answer"]),
        full_marks("chain_sum", 0, 3, "0x"),
        same_maths("2^{10}", "1024"),
    ]
    assert [one.passed for one in check_all(checks, False)] == [True, False, False, True, False, True]
    assert not trap.exists()


@pytest.mark.heavy
@needs_sandbox
def test_an_answer_that_cannot_be_computed_fails_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is per check: the checks before and after it get their results from the same run of the checker."""
    began = []
    ran = check_answers.run_program
    monkeypatch.setattr(check_answers, "run_program", lambda *arguments: began.append(1) or ran(*arguments))
    good = full_marks("chain_sum", 0, 3, gym_tasks.draw("chain_sum", 0, 3)[0]["answer"])
    tower = "9**9**9**9"
    checks = [good, full_marks("countdown", 0, 3, tower), good, same_maths("1", "9^{9^{9^{9}}}"), same_maths("1", "1")]
    found = check_all(checks, False)
    assert [one.passed for one in found] == [True, False, True, False, True]
    assert [one.detail for one in found] == [
        "",
        "the check exceeds its time limit",
        "",
        "the check exceeds its time limit",
        "",
    ]
    assert len(began) == 1


def test_a_check_ends_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a check that waits, exits, or exhausts its memory; its detail names the cause."""
    monkeypatch.setattr(checker, "_WALL_SECONDS", 0.5)
    monkeypatch.setattr(checker, "SECONDS", 0.5)
    scripted: dict[str, Callable[[], bool]] = {
        "": lambda: True,
        "the check exceeds its time limit": lambda: bool(signal.pause()),
        "the check exited with code 7": lambda: bool(os._exit(7)),
        "the check exceeds its memory limit": lambda: bool(bytearray(1 << 40)),
        "ZeroDivisionError: ": lambda: bool(1 // 0),
        "the check ended by SIGTERM": lambda: bool(os.kill(os.getpid(), signal.SIGTERM)),
    }
    for detail, outcome in scripted.items():
        monkeypatch.setattr(checker, "prepared", lambda _, outcome=outcome: outcome)
        passed, text = checker.check_answer({})
        assert passed == (not detail)
        assert text.startswith(detail)


def test_a_majority_counts_equal_answers() -> None:
    assert majority(4, [(1, 2), (1, 3), (2, 3)]) == (1, 3)
    assert majority(3, []) == (0, 1)


def test_answers_are_read_by_form() -> None:
    assert boxed(r"so \boxed{1} or \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert boxed("none") is None
    assert read_problem("Problem: a\nSolution: b \\boxed{2}") == ("a", "b \\boxed{2}", "2")
    assert read_problem("Problem: a\nSolution: b") is None
    assert read_code("t\n```python\nx = 1\n```\nand\n```python\nassert x\n```") == ("t", "x = 1\n", "assert x\n")
    assert read_code("```python\nx = 1\n```") is None
    assert blocks(program_document("t", "x = 1", "assert x")) == ["x = 1\n", "assert x\n"]


# Copies, recipes, the whole step


def test_copies_of_the_corpus_and_of_each_other_are_found(tmp_path: Path) -> None:
    words = " ".join(f"w{i}" for i in range(300))
    texts = [words, words.replace("w7 ", "other "), "something else altogether that nobody said", words]
    log = Log(tmp_path / "made-00000.jsonl")
    for number, text in enumerate(texts):
        log.add(FinishedItem(f"g/{number}", text, "", "", {}))
    item_copies.sketch_shard({"shard": 0, "log": str(log.path)}, tmp_path)
    sketch = item_copies.sketch_path(tmp_path, 0)
    assert item_copies.repeated_documents([sketch]) == {"g/3": "g/0"}
    rephrasings(tmp_path / "corpus", [words, "not like any of them at all"])
    row = {"shard": 0, "path": str(tmp_path / "corpus" / "documents-00000.parquet")}
    found = json.loads(item_copies.compare_shard(row, [sketch], 0.7)["copies"])
    assert {key for key, _, _ in found} == {"g/0", "g/1", "g/3"}
    exact = json.loads(item_copies.compare_shard(row, [sketch], 0.0)["copies"])
    assert {key for key, _, _ in exact} == {"g/0", "g/3"}


def test_mistakes_are_found_before_anything_starts() -> None:
    with pytest.raises(ValidationError, match="needs a `teacher`"):
        SynthesizeConfig.model_validate({"generators": [{"kind": "code", "name": "c"}]})
    with pytest.raises(ValidationError, match="unknown kind of generator"):
        SynthesizeConfig.model_validate({"generators": [{"kind": "poems", "name": "c"}]})
    gone = config("http://x/v1", {"kind": "gym", "name": "g", "tasks": ["chain_sums"]})
    with pytest.raises(RecipeError) as error:
        step.check(gone, {})
    assert "chain_sum" in error.value.hint
    with pytest.raises(RecipeError, match="'faq' needs the input `documents`"):
        step.check(config("http://x/v1", FAQ), {})


RECIPE = """
name: made
steps:
  synthesize:
    with:
      shard_items: {shard_items}
      attempts: 2
      budget: {{dollars: 1.0, dollars_per_million_prompt_tokens: 1.0, dollars_per_million_answer_tokens: 2.0}}
      teacher: {{url: "{url}", model: sums, max_tokens: 64, retries: 0}}
      generators:
        - {{kind: gym, name: sums, tasks: [chain_sum, gcd], items: 10, license: Apache-2.0}}
        - {{kind: programs, name: programs, items: 2}}
        - {{kind: code, name: code, items: 4}}
"""


@needs_sandbox
def test_the_step_over_ray(tmp_path: Path, home: Home, ray_cluster: Cluster, server: TeacherServer) -> None:
    """The same documents from one shard a generator and from many; costs and reasons are in counts and rows."""
    texts = []
    for shard_items in (64, 3):
        recipe = parse_recipe(RECIPE.format(url=server.url, shard_items=shard_items), Path("made.yaml"))
        result = Runner(home, ray_cluster, []).run(recipe)
        artifact = result.steps["synthesize"].artifact
        tables = [read_shard(path) for path in sorted(artifact.folder.glob("documents-*.parquet"))]
        texts.append(sorted((row["id"], row["text"]) for table in tables for row in table.to_pylist()))
        rejected = [read_shard(path) for path in sorted(artifact.folder.glob("rejected-*.parquet"))]
        counts = artifact.manifest.counts
        assert counts["out:documents"] == len(texts[-1]) >= 13
        assert counts["in:items"] == 16 == len(texts[-1]) + sum(table.num_rows for table in rejected)
        assert not [path for path in artifact.folder.iterdir() if path.name.startswith(".")]
        assert not reverify(artifact.folder).failed
    assert texts[0] == texts[1]
    assert len(server.asked) == len(set(server.asked)), "the second run took its answers from the cache"
