"""Rejection sampling: queries the teacher for an item until an answer passes its verifier, at most `attempts` times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from moray.pipelines.synthesize.config import SynthesizeConfig
from moray.pipelines.synthesize.generators.generator import ItemAnswer, TeacherGenerator, VerifiedAnswer
from moray.pipelines.synthesize.items import FinishedItem, Item, Log, finish, reject
from moray.pipelines.synthesize.teacher import TeacherClient

_SEED_STEP = 1009  # between the attempts of an item
_SEED_BITS = 0x7FFFFFFF


class RejectionSampling:
    """The items of one shard, in rounds. A round requests one answer for each item without an accepted one."""

    def __init__(self, generator: TeacherGenerator, client: TeacherClient, config: SynthesizeConfig, log: Log) -> None:
        self._generator, self._client, self._config, self._log = generator, client, config, log
        self._tried: dict[str, list[VerifiedAnswer]] = defaultdict(list)  # answers by item
        self._unanswered: list[FinishedItem] = []

    def run(self, items: Sequence[Item]) -> list[FinishedItem]:
        """Logs finished items, accepted or rejected. Returns items without an answer, with the failure."""
        pending = [item for item in items if self._write_prompt(item)]
        for attempt in range(self._config.attempts):
            pending = self._verify(self._request(pending, attempt), attempt)
        return self._unanswered

    def _write_prompt(self, item: Item) -> bool:
        item.meta["model"] = self._client.model
        try:
            item.prompt = self._generator.prompt(item)
        except Exception as error:  # any error of a generator rejects only this item
            self._log.add(reject(item, "generator", f"{type(error).__name__}: {error}"))
            return False
        return True

    def _request(self, items: Sequence[Item], attempt: int) -> list[ItemAnswer]:
        """The answers of the items that got one."""
        seeds = [(item.seed + _SEED_STEP * attempt) & _SEED_BITS for item in items]
        answers = self._client.query([(item.prompt, seed) for item, seed in zip(items, seeds, strict=True)])
        found = []
        for item, seed, answer in zip(items, seeds, answers, strict=True):
            if answer.failure == "prompt":
                self._log.add(reject(item, "prompt", answer.detail, cost=_cost(self._tried[item.key])))
            elif answer.failure:
                self._unanswered.append(reject(item, answer.failure, answer.detail))
            else:
                found.append(ItemAnswer(item, answer.text, seed, answer.cost))
        return found

    def _verify(self, answers: Sequence[ItemAnswer], attempt: int) -> list[Item]:
        """Verifies answers. Returns the items for the next round."""
        pending = []
        for answer, result in zip(answers, self._generator.verify(answers, self._client.query), strict=True):
            item = answer.item
            if result.failure:
                self._unanswered.append(reject(item, result.failure, "during verification"))
                continue
            result.cost += answer.cost
            result.meta |= {"attempt": str(attempt), "answer_seed": str(answer.seed)}
            self._tried[item.key].append(result)
            enough = self._config.pick == "first" and not result.reason
            if enough or attempt == self._config.attempts - 1:
                self._log.add(_choose(item, self._tried[item.key]))
            else:
                pending.append(item)
        return pending


def _choose(item: Item, tried: Sequence[VerifiedAnswer]) -> FinishedItem:
    """The shortest answer that passed, or else a reject with the last answer."""
    cost = _cost(tried)
    passed = [one for one in tried if not one.reason]
    if not passed:
        last = tried[-1]
        return reject(item, last.reason, last.detail, last.text, last.verifier, cost, **last.meta)
    best = min(passed, key=lambda one: len(one.text))
    return finish(item, best.text, best.verifier, "passed", cost, **best.meta)


def _cost(tried: Sequence[VerifiedAnswer]) -> float:
    return sum(one.cost for one in tried)
