"""Learning rate and bias speed as functions of tokens, not steps, so that a change of batch size does not move them."""

from __future__ import annotations

import math

from moray.pipelines.pretrain.config import Schedule


def learning_rate(schedule: Schedule, tokens: int, total: int) -> float:
    """The rate for the step that begins after `tokens` of `total` tokens."""
    if tokens < schedule.warmup_tokens:
        return schedule.peak * (tokens + 1) / (schedule.warmup_tokens + 1)
    decay = total // 2 if schedule.decay_tokens is None else min(schedule.decay_tokens, total)
    into = tokens - (total - decay)
    if into <= 0:
        return schedule.peak
    return schedule.final + 0.5 * (schedule.peak - schedule.final) * (1 + math.cos(math.pi * into / decay))


def bias_speed(schedule: Schedule, tokens: int, total: int) -> float:
    """Speed of the router bias update: constant, then zero for the last `bias_frozen_tokens`."""
    return 0.0 if tokens >= total - schedule.bias_frozen_tokens > 0 else schedule.bias_speed
