"""Tasks of reasoning-gym as documents, solved by the task itself or by the teacher, and scored by the task."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moray.pipelines.synthesize.chains import chain_document, steps
from moray.pipelines.synthesize.check_answers import check_all, full_marks
from moray.pipelines.synthesize.config import Gym
from moray.pipelines.synthesize.generators.generator import (
    GeneratorContext,
    ItemAnswer,
    ProceduralGenerator,
    Query,
    TeacherGenerator,
    VerifiedAnswer,
)
from moray.pipelines.synthesize.gym_tasks import choose_tasks, draw, need_packages, score_answer
from moray.pipelines.synthesize.items import FinishedItem, Item, finish, reject
from moray.pipelines.synthesize.prompts import boxed, solve

_VERIFIER = "reasoning-gym"


class SolvedTaskGenerator(ProceduralGenerator):
    """Each task with its own answer, and with worked steps if they are known."""

    def __init__(self, config: Gym) -> None:
        self._config = config

    def check(self, inputs: Collection[str]) -> None:
        need_packages("reasoning_gym")
        choose_tasks(self._config.tasks, with_answer=True)

    def make(self, item: Item) -> FinishedItem:
        """Accepted if the task's scorer accepts the task's own answer."""
        try:
            _draw_task(self._config, item)
            answer, level = item.facts["answer"], int(item.meta["level"])
            passed = score_answer(item.meta["task"], level, item.seed, answer) >= 1.0
            worked = steps(item.meta["task"], item.facts["metadata"])
        except Exception as error:  # any error of a task rejects only this item
            return reject(item, "generator", f"{type(error).__name__}: {error}")
        text = chain_document(item.facts["question"], worked, answer, item.seed)
        if not passed:
            return reject(item, "wrong", f"the task rejects its own answer {answer!r}", text, _VERIFIER)
        count = worked.count("\n") + bool(worked)
        return finish(item, text, _VERIFIER, "full marks", answer=answer, steps=str(count))


class TeacherTaskGenerator(TeacherGenerator):
    """Tasks solved by the teacher, which must box its answer."""

    def __init__(self, config: Gym, context: GeneratorContext) -> None:
        self._config, self._unsafe = config, context.unsafe

    def check(self, inputs: Collection[str]) -> None:
        need_packages("reasoning_gym")
        need_packages("math_verify", "reasoning_gym")
        choose_tasks(self._config.tasks, with_answer=False)

    def prompt(self, item: Item) -> str:
        _draw_task(self._config, item)
        return solve(item.facts["question"])

    def verify(self, answers: Sequence[ItemAnswer], query: Query) -> list[VerifiedAnswer]:
        """Accepts answers whose boxed result gets the full score of the task."""
        results = [VerifiedAnswer(answer.text, "form", "no \\boxed{} answer") for answer in answers]
        found = {at: box for at, answer in enumerate(answers) if (box := boxed(answer.text)) is not None}
        items = {at: answers[at].item for at in found}
        checks = [
            full_marks(items[at].meta["task"], int(items[at].meta["level"]), items[at].seed, box)
            for at, box in found.items()
        ]
        for (at, box), checked in zip(found.items(), check_all(checks, self._unsafe), strict=True):
            item = items[at]
            text = chain_document(str(item.facts["question"]), answers[at].text.strip(), box, item.seed)
            reason = "" if checked.passed else "wrong"
            results[at] = VerifiedAnswer(text, reason, checked.detail, _VERIFIER, meta={"answer": box})
        return results


def _draw_task(config: Gym, item: Item) -> None:
    """Draws the item's task. Tasks alternate, and levels rise with the item number: documents follow the curriculum."""
    tasks = choose_tasks(config.tasks, config.solver == "task")
    wanted = config.levels[item.number * len(config.levels) // config.items]
    task = tasks[item.number % len(tasks)]
    entry, level = draw(task, wanted, item.seed)
    item.meta |= {"task": task, "level": str(level)}
    item.facts |= {"question": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
