"""Batches that would harm, and how training gets past them.

A loss that is not finite, or that lies far above the last ones (a spike), is seen before the weights change:

1. the batch is skipped, and written down;
2. if the next ones look as bad, it is the weights that are bad: training goes back to a checkpoint from before the last
   step that was taken, and skips the batch of that step;
3. where trouble returns, tokens are for a while routed as slightly older weights would have (`anticipation.py`).

Every decision is a function of losses and norms that all ranks share, and so is the same on all of them.

"Far above": more than `sigmas` deviations above the median of the last 16 losses. The deviation is that of losses from
step to step over `window` steps, which a falling curve does not enlarge: 1.4826 times the median size of the
differences, over the square root of two. It is at least 1 % of the loss and, for losses below one nat, a tenth of what
they lack to it: the losses of a memorised text jitter by many times their size, which does no harm.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from moray.pipelines.pretrain.config import Spikes
from moray.platform.core.atomic import write_text

RECORD = "troubles.json"
_FEWEST = 16  # losses from which a spike can be told
_PATIENCE = 2  # batches in a row that are skipped before the weights are held to be bad
_MOST = 3  # times that a run goes back
_LEAST_DEVIATION = 0.01  # of the loss
_KNOWN_DEVIATION = 0.1  # of what a loss lacks to one nat

Verdict = Literal["take", "skip", "back"]


class Trouble(BaseModel):
    """A batch that is not trained on: the step it was to be in, and what was seen of it, or after it."""

    model_config = ConfigDict(frozen=True)

    step: int
    why: str


class GuardRecord(BaseModel):
    """`troubles.json`, beside the checkpoints: it outlives a roll-back. `anticipated`: the steps [first, last) that are
    routed by older weights. A step in `empty` is no trouble."""

    skipped: list[Trouble] = []
    empty: list[int] = []  # steps whose batches had nothing to learn
    rollbacks: int = 0
    anticipated: tuple[int, int] = (0, 0)


def read_record(folder: Path) -> GuardRecord:
    """What is written down in the folder of a run."""
    path = folder / RECORD
    return GuardRecord.model_validate_json(path.read_text()) if path.exists() else GuardRecord()


class Guard:
    """Judges every step. `history` is what is written down.

    `losses`, float64 [window], are those of the last steps taken; NaN where there were none yet.
    """

    def __init__(self, config: Spikes, history: GuardRecord) -> None:
        self.config = config
        self.history = history
        self.losses = torch.full((config.window,), math.nan, dtype=torch.float64)
        self._bad: list[int] = []  # the last steps, all of which were bad

    def write(self, folder: Path) -> None:
        write_text(folder / RECORD, self.history.model_dump_json(indent=1) + "\n")

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """What to do with a step of which this was measured. Skipping is written into the record."""
        why = self._complaint(loss, norm)
        if not why:
            self._bad.clear()
            self.losses[:-1] = self.losses[1:].clone()
            self.losses[-1] = loss
            return "take"
        self._bad.append(step)
        if len(self._bad) > _PATIENCE:
            return "back"
        if any(0 < step - trouble.step <= self.config.window for trouble in self.history.skipped):
            self._anticipate(step, step)
        self.history.skipped.append(Trouble(step=step, why=why))
        return "skip"

    def leave_out(self, step: int) -> None:
        """Writes down a step whose batch changes no weight, though nothing is wrong with it."""
        if step not in self.history.empty:
            self.history.empty.append(step)

    def go_back(self) -> int:
        """The step whose batch spoilt the weights, which is from now on skipped; those after it are not.

        Raises FloatingPointError if training has gone back too often.
        """
        first, last = self._bad[0], self._bad[-1]
        guilty = max(0, first - 1)
        while guilty and self.skips(guilty):
            guilty -= 1
        record = self.history
        if record.rollbacks >= _MOST:
            raise FloatingPointError(
                f"the loss at step {last} is bad after going back {record.rollbacks} times; lower schedule.peak or clip"
            )
        bad = set(self._bad)
        record.skipped = [trouble for trouble in record.skipped if trouble.step not in bad]
        record.skipped.append(Trouble(step=guilty, why=f"after it, {len(bad)} batches in a row were bad"))
        record.rollbacks += 1
        self._anticipate(guilty, last)
        self._bad.clear()
        return guilty

    def skips(self, step: int) -> bool:
        return any(trouble.step == step for trouble in self.history.skipped)

    def taken(self, steps: int) -> int:
        """How many of the first so many steps changed the weights."""
        left_out = {trouble.step for trouble in self.history.skipped} | set(self.history.empty)
        return steps - sum(step < steps for step in left_out)

    def anticipates(self, step: int) -> bool:
        """Whether a step is routed by older weights."""
        first, last = self.history.anticipated
        return first <= step < last

    def _anticipate(self, first: int, last: int) -> None:
        self.history.anticipated = (first, last + self.config.anticipate_steps)

    def _complaint(self, loss: float, norm: float) -> str:
        """What is wrong with a step, or ""."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss}, the gradient's norm {norm}"
        known = self.losses[~self.losses.isnan()]
        if self.config.sigmas is None or len(known) < _FEWEST:
            return ""
        median = known[-_FEWEST:].median().item()
        noise = 1.4826 * known.diff().abs().median().item() / math.sqrt(2)
        deviation = max(noise, _LEAST_DEVIATION * abs(median), _KNOWN_DEVIATION * (1.0 - median))
        if loss <= median + self.config.sigmas * deviation:
            return ""
        return f"the loss is {loss:.3f}, {(loss - median) / deviation:.0f} deviations above {median:.3f}"
