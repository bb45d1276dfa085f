"""Moray's own server as the teacher of `synthesize`: a refused prompt rejects only its item."""

from __future__ import annotations

from pathlib import Path

from moray.pipelines.synthesize.budget_tracker import LocalBudgetTracker
from moray.pipelines.synthesize.config import Budget, Teacher
from moray.pipelines.synthesize.teacher import TeacherClient


def test_our_server_teaches(url: str, tmp_path: Path) -> None:
    budget = Budget(tokens=100_000)
    teacher = Teacher.model_validate(
        {"url": f"{url}/v1", "model": "tiny", "chat": False, "max_tokens": 8, "retries": 0, "concurrency": 2}
    )
    tracker = LocalBudgetTracker(str(tmp_path / "spent.jsonl"), budget)
    query = TeacherClient(teacher, budget, tracker, tmp_path / "cache", 2).query
    asked = [("In the beginning was", 1), ("def main(", 2), ("word " * 2000, 3)]
    first, second, long = query(asked)
    assert first.text
    assert second.text
    assert (first.failure, second.failure, long.failure) == ("", "", "prompt"), long
    spent = tracker.spent()
    assert (spent.requests, spent.answer_tokens) == (2, 16)
    assert 4 < spent.prompt_tokens < 60
    assert query(asked[:2]) == [first, second]
    assert tracker.spent() == spent, "the second time the answers came from the cache"
