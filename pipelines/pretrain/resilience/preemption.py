"""Preemption notices (of a spot instance or a drained node), as Ray Train reports them to its workers."""

from __future__ import annotations

import time

_MARGIN = 5.0  # seconds to spare before the deadline
_DEFAULT_SAVE = 30.0  # seconds assumed for a save if none has ended yet
_GRACE = 150.0  # seconds after the deadline until a machine that was not preempted is used again


class NoPreemption:
    """Reports no preemption: for machines that are not preempted, and the base of PreemptionNotice."""

    def is_due(self, save_seconds: float) -> bool:
        """Whether it is time to write a last checkpoint. save_seconds: duration of a save; 0 if unknown."""
        return False

    def wait(self) -> None:
        """Waits for the preemption, which ends this process. Returns only if the machine is not preempted."""


class PreemptionNotice(NoPreemption):
    """Preemption of the machines of this Ray Train run."""

    def __init__(self) -> None:
        self._ignored = 0.0  # a deadline that passed without a preemption
        self._seen = 0.0  # when the first notice arrived

    def is_due(self, save_seconds: float) -> bool:
        deadline = self._deadline()
        if deadline is None or deadline <= self._ignored:
            return False
        return deadline - time.time() < _MARGIN + 2 * (save_seconds or _DEFAULT_SAVE)

    def wait(self) -> None:
        while (deadline := self._deadline()) is not None and time.time() < deadline + _GRACE:
            time.sleep(0.5)
        self._ignored = deadline or 0.0

    def _deadline(self) -> float | None:
        """Deadline in seconds since the epoch. If Ray has none, the time at which the notice arrived; None without a
        notice."""
        # `ray.train.get_preemption_info` is a collective of all workers through an actor, too slow for every step.
        from ray.train.v2._internal.execution.context import get_train_context

        info = get_train_context().preemption_context.preemption_info
        if info is None:
            return None
        self._seen = self._seen or time.time()
        return self._seen if info.deadline_ms is None else info.deadline_ms / 1000
