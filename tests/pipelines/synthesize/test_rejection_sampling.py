"""Rejection sampling over a generator with known outcomes: the repeated requests, and the kept answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest

from moray.pipelines.synthesize.budget_tracker import LocalBudgetTracker
from moray.pipelines.synthesize.config import SynthesizeConfig
from moray.pipelines.synthesize.generators.generator import ItemAnswer, Query, TeacherGenerator, VerifiedAnswer
from moray.pipelines.synthesize.items import FinishedItem, Item, Log
from moray.pipelines.synthesize.rejection_sampling import RejectionSampling
from moray.pipelines.synthesize.teacher import TeacherClient
from tests.pipelines.synthesize.teacher_server import teacher_server


class Attempts(TeacherGenerator):
    """Item n passes from its attempt n on; the later an attempt, the shorter its document. Item 9 has no prompt."""

    def __init__(self) -> None:
        self.rounds: list[list[int]] = []

    def check(self, inputs: Collection[str]) -> None:
        raise AssertionError("not called")

    def prompt(self, item: Item) -> str:
        if item.number == 9:
            raise KeyError("nothing to ask")
        return f"prompt {item.number}"

    def verify(self, answers: Sequence[ItemAnswer], query: Query) -> list[VerifiedAnswer]:
        attempt = len(self.rounds)
        self.rounds.append([answer.item.number for answer in answers])
        return [
            VerifiedAnswer("x" * (5 - attempt), "" if attempt >= answer.item.number else "wrong") for answer in answers
        ]


def sample(folder: Path, pick: str) -> tuple[Attempts, dict[str, FinishedItem]]:
    with teacher_server() as server:
        code: dict[str, Any] = {"kind": "code", "name": "g"}
        teacher = {"url": server.url, "model": "sums", "retries": 0}
        config = SynthesizeConfig.model_validate(
            {"generators": [code], "teacher": teacher, "attempts": 3, "pick": pick}
        )
        assert config.teacher
        tracker = LocalBudgetTracker(str(folder / "spent.jsonl"), config.budget)
        client = TeacherClient(config.teacher, config.budget, tracker, folder / "cache", threads=1)
        generator, log = Attempts(), Log(folder / "made.jsonl")
        items = [Item("g", number, seed=number) for number in (0, 1, 5, 9)]
        assert RejectionSampling(generator, client, config, log).run(items) == []
        return generator, log.read()


def test_the_first_answer_that_passes_is_kept(tmp_path: Path) -> None:
    generator, made = sample(tmp_path, "first")
    assert generator.rounds == [[0, 1, 5], [1, 5], [5]]
    assert {key: one.reason for key, one in made.items()} == {
        "g/0": "",
        "g/1": "",
        "g/5": "wrong",
        "g/9": "generator",
    }
    assert [made[key].meta["attempt"] for key in ("g/0", "g/1", "g/5")] == ["0", "1", "2"]


def test_the_best_answer_is_the_shortest_of_all_that_pass(tmp_path: Path) -> None:
    generator, made = sample(tmp_path, "best")
    assert generator.rounds == [[0, 1, 5]] * 3
    assert [made[key].text for key in ("g/0", "g/1")] == ["xxx", "xxx"]


@pytest.mark.parametrize("pick", ["first", "best"])
def test_an_item_that_never_passes_keeps_its_last_answer(tmp_path: Path, pick: str) -> None:
    _, made = sample(tmp_path, pick)
    assert (made["g/5"].text, made["g/5"].reason) == ("xxx", "wrong")
