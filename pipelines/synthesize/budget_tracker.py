"""Tracks the spent budget of a run and the failures of its teacher, in one actor, because all tasks share the budget.

The maximum cost of a request is reserved before it is sent, and replaced by the actual cost when the answer arrives.
Both are lines in a file, so that requests in flight when a run was killed still count in the next run, at their maximum
cost. An object in the store cannot be appended to, so an upper bound of the sums is written there, before they exceed
it. A run that resumes counts the bound as spent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

from moray.pipelines.synthesize.config import Budget
from moray.platform.store.paths import AnyPath, StorePath, any_path

_BOUND = 1.01  # times the sums
DEAD_AFTER = 8  # consecutive requests that the engine failed, after all retries of each
_CALL_RETRIES = 20


@dataclass(frozen=True)
class Spent:
    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    dollars: float = 0.0


class BudgetTracker(Protocol):
    """Interface for tasks."""

    def reserve(self, key: str, prompt_tokens: int, answer_tokens: int) -> str:
        """'' if the request may be sent, else the reason: budget or engine."""

    def settle(self, key: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Replaces the reservation by the actual numbers of tokens."""

    def failed(self, key: str, engine: bool) -> None:
        """Releases the reservation of a failed request. engine: the engine failed, not the request."""

    def spent(self) -> Spent:
        """The total so far, including reservations."""


class LocalBudgetTracker:
    """The implementation, which runs in an actor."""

    def __init__(self, path: str, budget: Budget) -> None:
        self._path, self._budget = any_path(path), budget
        self._bound = (0, 0)  # sums of tokens that the store has
        self._amounts: dict[str, tuple[int, int]] = {}
        self._prompts = self._answers = self._failures = 0
        if self._path.exists():
            data = self._path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            self._path.write_bytes(whole)
            for line in whole.splitlines():
                self._set(*json.loads(line))
        self._bound = (self._prompts, self._answers)

    def reserve(self, key: str, prompt_tokens: int, answer_tokens: int) -> str:
        if self._failures >= DEAD_AFTER:
            return "engine"
        known = self._amounts.get(key, (0, 0))
        prompts, answers = self._prompts + prompt_tokens - known[0], self._answers + answer_tokens - known[1]
        if self._budget.tokens is not None and prompts + answers > self._budget.tokens:
            return "budget"
        if self._budget.dollars is not None and dollars(self._budget, prompts, answers) > self._budget.dollars:
            return "budget"
        self._write(key, prompt_tokens, answer_tokens)
        return ""

    def settle(self, key: str, prompt_tokens: int, answer_tokens: int) -> None:
        self._failures = 0
        self._write(key, prompt_tokens, answer_tokens)

    def failed(self, key: str, engine: bool) -> None:
        self._failures = self._failures + 1 if engine else 0
        self._write(key, 0, 0)

    def spent(self) -> Spent:
        requests = sum(any(amount) for amount in self._amounts.values())
        return Spent(requests, self._prompts, self._answers, dollars(self._budget, self._prompts, self._answers))

    def _set(self, key: str, prompt_tokens: int, answer_tokens: int) -> None:
        known = self._amounts.get(key, (0, 0))
        self._prompts += prompt_tokens - known[0]
        self._answers += answer_tokens - known[1]
        self._amounts[key] = (prompt_tokens, answer_tokens)

    def _write(self, key: str, prompt_tokens: int, answer_tokens: int) -> None:
        self._set(key, prompt_tokens, answer_tokens)
        if isinstance(self._path, StorePath):
            self._raise_bound(self._path)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(json.dumps([key, prompt_tokens, answer_tokens]).encode() + b"\n")

    def _raise_bound(self, path: StorePath) -> None:
        """Writes a new bound if the sums exceed it. It is a little higher than they are, so that few writes suffice."""
        if self._prompts > self._bound[0] or self._answers > self._bound[1]:
            self._bound = (int(self._prompts * _BOUND), int(self._answers * _BOUND))
            path.write_bytes(json.dumps(["earlier requests", *self._bound]).encode() + b"\n")


def dollars(budget: Budget, prompt_tokens: int, answer_tokens: int) -> float:
    prompt, answer = budget.dollars_per_million_prompt_tokens, budget.dollars_per_million_answer_tokens
    return (prompt_tokens * prompt + answer_tokens * answer) / 1e6


class RemoteBudgetTracker:
    """A handle to the tracker's actor, usable from any task."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def reserve(self, key: str, prompt_tokens: int, answer_tokens: int) -> str:
        return _get(self._actor.reserve.remote(key, prompt_tokens, answer_tokens))

    def settle(self, key: str, prompt_tokens: int, answer_tokens: int) -> None:
        _get(self._actor.settle.remote(key, prompt_tokens, answer_tokens))

    def failed(self, key: str, engine: bool) -> None:
        _get(self._actor.failed.remote(key, engine))

    def spent(self) -> Spent:
        return _get(self._actor.spent.remote())


def _get(reference: Any) -> Any:
    import ray

    return ray.get(reference)


def start_budget_tracker(path: AnyPath, budget: Budget) -> RemoteBudgetTracker:
    """Starts the tracker on the driver's node, which holds its file. If it dies, it is restarted and reads the file."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": _CALL_RETRIES, "scheduling_strategy": driver_node}
    return RemoteBudgetTracker(ray.remote(LocalBudgetTracker).options(**options).remote(str(path), budget))
