"""Notice that a machine is to be taken away (a spot instance, a drained node), as Ray Train passes it on to workers."""

from __future__ import annotations

import time

_LEAST = 5.0  # seconds to spare
_UNKNOWN = 30.0  # seconds that a checkpoint is given where none was written yet
_AFTER = 150.0  # seconds after which a machine that was not taken away is used again


class NoNotice:
    """Of machines that stay."""

    def is_near(self, saving: float) -> bool:
        """Whether it is time to write a last checkpoint, which takes so many seconds (0: not known)."""
        return False

    def wait(self) -> None:
        """Until the machine is taken away, which ends this process; returns only if that does not come."""


class Notice(NoNotice):
    """Of the machines of this Ray Train run."""

    def __init__(self) -> None:
        self._ignored = 0.0  # a deadline that passed without anything happening
        self._seen = 0.0  # when the first notice came

    def is_near(self, saving: float) -> bool:
        deadline = self._deadline()
        if deadline is None or deadline <= self._ignored:
            return False
        return deadline - time.time() < _LEAST + 2 * (saving or _UNKNOWN)

    def wait(self) -> None:
        while (deadline := self._deadline()) is not None and time.time() < deadline + _AFTER:
            time.sleep(0.5)
        self._ignored = deadline or 0.0

    def _deadline(self) -> float | None:
        """Seconds since the epoch; when the notice came, where Ray was not told more; None without a notice."""
        # `ray.train.get_preemption_info` is a collective of all workers through an actor: too dear for every step.
        from ray.train.v2._internal.execution.context import get_train_context

        info = get_train_context().preemption_context.preemption_info
        if info is None:
            return None
        self._seen = self._seen or time.time()
        return self._seen if info.deadline_ms is None else info.deadline_ms / 1000
