"""Loss spikes and non-finite losses: detection and recovery.

A loss that is not finite, or that is far above recent losses (a spike), is detected before the weights change:

1. The batch is skipped and recorded.
2. If the following batches are bad too, the weights are: training rolls back to a checkpoint from before the last step
   that was taken, and skips the batch of that step.
3. If spikes return, tokens are routed by slightly older weights for a number of steps (`routing_replay.py`).

Every decision is a function of losses and norms that are equal on all ranks, so all ranks decide the same.

"Far above" means more than `sigmas` deviations above the median of the last 16 losses. The deviation is 1.4826 times
the median absolute difference between consecutive losses of the last `window` steps, divided by the square root of two;
a falling curve does not enlarge it. It is at least 1 % of the loss. For losses below one nat it is also at least a
tenth of their distance to one nat, because the losses of a memorised text harmlessly vary by many times their size.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from moray.pipelines.pretrain.config import Spikes
from moray.platform.store.paths import AnyPath, write_file

RECORD = "troubles.json"
_MIN_LOSSES = 16  # recent losses that are required to detect a spike
_MAX_SKIPS_IN_A_ROW = 2  # after more bad batches in a row, the weights count as bad
_MAX_ROLLBACKS = 3
_MIN_DEVIATION = 0.01  # of the loss
_MIN_DEVIATION_BELOW_ONE = 0.1  # of a loss's distance to one nat

GuardDecision = Literal["take", "skip", "back"]


class SkippedBatch(BaseModel):
    """A batch that is not trained on: its step, and the reason."""

    model_config = ConfigDict(frozen=True)

    step: int
    why: str


class GuardRecord(BaseModel):
    """Contents of `troubles.json`, which lies beside the checkpoints and therefore survives a rollback.

    anticipated: steps [first, last) are routed by older weights. empty: steps whose batches had no target; they do not
    count as spikes.
    """

    skipped: list[SkippedBatch] = []
    empty: list[int] = []
    rollbacks: int = 0
    anticipated: tuple[int, int] = (0, 0)


def read_record(folder: AnyPath) -> GuardRecord:
    """The record in the folder of a run; empty if there is none."""
    try:
        return GuardRecord.model_validate_json((folder / RECORD).read_text())
    except FileNotFoundError:
        return GuardRecord()


class Guard:
    """Decides about every step. `history` is the record on disk.

    losses: float64 [window], losses of the last steps that were taken; NaN in places not yet filled.
    """

    def __init__(self, config: Spikes, history: GuardRecord) -> None:
        self.config = config
        self.history = history
        self.losses = torch.full((config.window,), math.nan, dtype=torch.float64)
        self._bad: list[int] = []  # the current run of consecutive bad steps

    def write(self, folder: AnyPath) -> None:
        write_file(folder / RECORD, f"{self.history.model_dump_json(indent=1)}\n".encode())

    def decide(self, step: int, loss: float, norm: float) -> GuardDecision:
        """Decides about a step with this loss and gradient norm. Adds a skipped batch to `history`."""
        why = self._problem(loss, norm)
        if not why:
            self._bad.clear()
            self.losses[:-1] = self.losses[1:].clone()
            self.losses[-1] = loss
            return "take"
        self._bad.append(step)
        if len(self._bad) > _MAX_SKIPS_IN_A_ROW:
            return "back"
        if any(0 < step - batch.step <= self.config.window for batch in self.history.skipped):
            self._anticipate(step, step)
        self.history.skipped.append(SkippedBatch(step=step, why=why))
        return "skip"

    def record_empty(self, step: int) -> None:
        """Records a step whose batch has no target and therefore changes no weight."""
        if step not in self.history.empty:
            self.history.empty.append(step)

    def roll_back(self) -> int:
        """Finds the step whose batch damaged the weights, and skips it from now on instead of the batches after it.

        Returns that step. Raises FloatingPointError after too many rollbacks.
        """
        first, last = self._bad[0], self._bad[-1]
        culprit = max(0, first - 1)
        while culprit and self.skips(culprit):
            culprit -= 1
        record = self.history
        if record.rollbacks >= _MAX_ROLLBACKS:
            raise FloatingPointError(
                f"the loss at step {last} is bad after {record.rollbacks} rollbacks; lower schedule.peak or clip"
            )
        bad = set(self._bad)
        record.skipped = [batch for batch in record.skipped if batch.step not in bad]
        record.skipped.append(SkippedBatch(step=culprit, why=f"{len(bad)} batches in a row after it were bad"))
        record.rollbacks += 1
        self._anticipate(culprit, last)
        self._bad.clear()
        return culprit

    def skips(self, step: int) -> bool:
        return any(batch.step == step for batch in self.history.skipped)

    def taken(self, steps: int) -> int:
        """How many of the first `steps` steps changed the weights."""
        not_taken = {batch.step for batch in self.history.skipped} | set(self.history.empty)
        return steps - sum(step < steps for step in not_taken)

    def anticipates(self, step: int) -> bool:
        """Whether a step is routed by older weights."""
        first, last = self.history.anticipated
        return first <= step < last

    def _anticipate(self, first: int, last: int) -> None:
        self.history.anticipated = (first, last + self.config.anticipate_steps)

    def _problem(self, loss: float, norm: float) -> str:
        """Description of a bad step, "" for a good one."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss}, the gradient norm {norm}"
        known = self.losses[~self.losses.isnan()]
        if self.config.sigmas is None or len(known) < _MIN_LOSSES:
            return ""
        median = known[-_MIN_LOSSES:].median().item()
        noise = 1.4826 * known.diff().abs().median().item() / math.sqrt(2)
        deviation = max(noise, _MIN_DEVIATION * abs(median), _MIN_DEVIATION_BELOW_ONE * (1.0 - median))
        if loss <= median + self.config.sigmas * deviation:
            return ""
        return f"the loss is {loss:.3f}, {(loss - median) / deviation:.0f} deviations above {median:.3f}"
