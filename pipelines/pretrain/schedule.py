"""What changes during training, as functions of tokens, not steps: a change of batch size does not move them."""

from __future__ import annotations

import math

from moray.pipelines.pretrain.config import Schedule


def learning_rate(schedule: Schedule, tokens: int, total: int) -> float:
    """The rate for the step that begins after `tokens` of `total` tokens."""
    if tokens < schedule.warmup_tokens:
        return schedule.peak * (tokens + 1) / (schedule.warmup_tokens + 1)
    decay = _decay_tokens(schedule, total)
    into = tokens - (total - decay)
    if into <= 0:
        return schedule.peak
    return schedule.final + 0.5 * (schedule.peak - schedule.final) * (1 + math.cos(math.pi * into / decay))


def prediction_weight(schedule: Schedule, tokens: int, total: int) -> float:
    """Weight of the multi-token prediction loss: lower once the learning rate decays."""
    decays = tokens >= total - _decay_tokens(schedule, total)
    return schedule.prediction_weight_final if decays else schedule.prediction_weight


def _decay_tokens(schedule: Schedule, total: int) -> int:
    return total // 2 if schedule.decay_tokens is None else min(schedule.decay_tokens, total)


def bias_speed(schedule: Schedule, tokens: int, total: int) -> float:
    """Speed of the router bias update: constant, then zero for the last `bias_frozen_tokens`."""
    return 0.0 if tokens >= total - schedule.bias_frozen_tokens > 0 else schedule.bias_speed
