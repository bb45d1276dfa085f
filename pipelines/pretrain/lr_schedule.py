"""Schedules as functions of tokens instead of steps, so that another batch size does not shift them."""

from __future__ import annotations

import math

from moray.actors.data.batch_plan import BatchPlan
from moray.pipelines.pretrain.config import PretrainConfig, TrainingSchedule


def batch_plan(config: PretrainConfig, sequence_length: int) -> BatchPlan:
    """The size of every step's global batch. Raises ValueError for a ramp that does not grow by whole sequences.

    A stage ends with the first step at which its share of the ramp's tokens has been trained on.
    """
    ramp, final = config.batch_ramp, config.batch_sequences
    if ramp is None:
        return BatchPlan.constant(final)
    if not 0 < ramp.sequences < final or (final - ramp.sequences) % ramp.stages:
        raise ValueError(
            f"batch_ramp: sequences ({ramp.sequences}) must grow to batch_sequences ({final}) by the same whole number "
            f"of sequences in each of {ramp.stages} stages"
        )
    starts, sizes, seen = [0], [ramp.sequences], 0
    for stage in range(1, ramp.stages + 1):
        target = ramp.tokens * stage // ramp.stages
        steps = max(1, -(-(target - seen) // (sizes[-1] * sequence_length)))
        seen += steps * sizes[-1] * sequence_length
        starts.append(starts[-1] + steps)
        sizes.append(ramp.sequences + (final - ramp.sequences) * stage // ramp.stages)
    return BatchPlan(tuple(starts), tuple(sizes))


def learning_rate(schedule: TrainingSchedule, tokens: int, total: int) -> float:
    """The learning rate of the step that starts after `tokens` of `total` tokens."""
    if tokens < schedule.warmup_tokens:
        return schedule.peak * (tokens + 1) / (schedule.warmup_tokens + 1)
    end = _decay_end(schedule, total)
    for plateau in schedule.plateaus:
        if end <= tokens < end + plateau.tokens:
            return plateau.rate
        end += plateau.tokens
    begin, decay = _decay_begin(schedule, total), decay_tokens(schedule, total)
    into = tokens - begin
    if into <= 0:
        return schedule.peak
    return schedule.final + 0.5 * (schedule.peak - schedule.final) * (1 + math.cos(math.pi * into / decay))


def prediction_weight(schedule: TrainingSchedule, tokens: int, total: int) -> float:
    """Weight of the MTP loss: `prediction_weight`, then `prediction_weight_final` from the start of the decay."""
    decays = tokens >= _decay_begin(schedule, total)
    return schedule.prediction_weight_final if decays else schedule.prediction_weight


def _decay_end(schedule: TrainingSchedule, total: int) -> int:
    return max(0, total - sum(plateau.tokens for plateau in schedule.plateaus))


def decay_tokens(schedule: TrainingSchedule, total: int) -> int:
    """Tokens of the cosine decay."""
    end = _decay_end(schedule, total)
    return end // 2 if schedule.decay_tokens is None else min(schedule.decay_tokens, end)


def _decay_begin(schedule: TrainingSchedule, total: int) -> int:
    return _decay_end(schedule, total) - decay_tokens(schedule, total)


def bias_speed(schedule: TrainingSchedule, tokens: int, total: int) -> float:
    """Speed of the router bias update: constant, then zero for the last `bias_frozen_tokens`."""
    return 0.0 if tokens >= total - schedule.bias_frozen_tokens > 0 else schedule.bias_speed
