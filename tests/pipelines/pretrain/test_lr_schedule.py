"""Learning rate and batch sizes: pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.pretrain.config import ModelSection, PretrainConfig, TrainingSchedule, model_config
from moray.pipelines.pretrain.lr_schedule import (
    batch_plan,
    bias_speed,
    learning_rate,
    prediction_weight,
)
from moray.pipelines.pretrain.validate import check_schedule
from moray.platform.api import RECIPES
from moray.platform.plan.recipe import load_recipe


def test_the_rate_warms_up_is_constant_and_decays() -> None:
    schedule = TrainingSchedule(peak=1.0, final=0.1, warmup_tokens=100, decay_tokens=400)
    rates = [learning_rate(schedule, tokens, 1000) for tokens in (0, 50, 100, 600, 800, 1000)]
    assert rates == pytest.approx([1 / 101, 51 / 101, 1.0, 1.0, 0.55, 0.1])


def test_plateaus_follow_the_cosine() -> None:
    plateaus = ({"tokens": 100, "rate": 0.1}, {"tokens": 50, "rate": 0.03})
    fields = {"peak": 1.0, "final": 0.1, "warmup_tokens": 100, "decay_tokens": 400, "plateaus": plateaus}
    schedule = TrainingSchedule.model_validate(fields)
    places = (99, 100, 449, 450, 650, 849, 850, 949, 950, 999)
    rates = [learning_rate(schedule, tokens, 1000) for tokens in places]
    assert rates == pytest.approx([100 / 101, 1, 1, 1, 0.55, 0.1, 0.1, 0.1, 0.03, 0.03], abs=1e-4)
    assert [prediction_weight(schedule, tokens, 1000) for tokens in (449, 450, 999)] == [0.3, 0.1, 0.1]


def test_deepseek_v3s_rates_are_where_its_report_has_them() -> None:
    """arXiv 2412.19437, 4.2: constant to 10 T, cosine over 4.3 T, 2.2e-5 for 333 B, 7.3e-6 for 167 B."""
    step = next(s for s in load_recipe(RECIPES / "v3-671b.yaml").steps if s.key == "pretrain")
    config: PretrainConfig = step.config
    plan = batch_plan(config, 4096)
    total = plan.before(config.steps) * 4096
    assert total == pytest.approx(14.8e12, rel=1e-5)
    check_schedule(config.schedule, total)
    assert plan.starts[1] > 2000, "the warm-up is in steps of the first size"
    assert config.schedule.warmup_tokens == plan.before(2000) * 4096
    rates = [
        learning_rate(config.schedule, int(at * 1e12), total) for at in (1, 9.99, 12.15, 14.29, 14.31, 14.62, 14.64)
    ]
    assert rates == pytest.approx([2.2e-4, 2.2e-4, 1.21e-4, 2.2e-5, 2.2e-5, 2.2e-5, 7.3e-6], rel=2e-3)
    assert [bias_speed(config.schedule, int(at * 1e12), total) for at in (14.29, 14.31)] == [1e-3, 0]
    assert plan.before(plan.starts[-1]) * 4096 == pytest.approx(469e9, rel=1e-3)


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 10_000))
def test_the_rate_is_a_function_of_tokens_not_of_steps(tokens: int, batch: int, total: int) -> None:
    schedule = TrainingSchedule(peak=1e-3, final=1e-5, warmup_tokens=500)
    rate = learning_rate(schedule, min(tokens, total), total)
    assert 0 < rate <= schedule.peak


def test_biases_freeze_at_the_end_only_where_asked() -> None:
    assert bias_speed(TrainingSchedule(bias_speed=0.5), 999, 1000) == 0.5
    frozen = TrainingSchedule(bias_speed=0.5, bias_frozen_tokens=100)
    assert [bias_speed(frozen, tokens, 1000) for tokens in (899, 900)] == [0.5, 0.0]


def test_a_section_overrides_its_preset() -> None:
    config = model_config(ModelSection(preset="tiny", hidden_size=64), vocab_size=300)
    assert (config.hidden_size, config.vocab_size) == (64, 300)
    with pytest.raises(ValueError, match="the presets are small, tiny, v3"):
        model_config(ModelSection(preset="tinny"), vocab_size=300)
    with pytest.raises(ValueError, match="n_group"):
        model_config(ModelSection(n_group=3), vocab_size=300)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 6), st.integers(1, 10**6), st.integers(1, 64))
def test_a_batch_grows_with_the_tokens(first: int, more: int, stages: int, tokens: int, length: int) -> None:
    ramp = {"sequences": first, "tokens": tokens, "stages": stages}
    final = first + more * stages
    plan = batch_plan(PretrainConfig.model_validate({"steps": 1, "batch_sequences": final, "batch_ramp": ramp}), length)
    assert plan.sizes == tuple(first + more * stage for stage in range(stages + 1))
    assert plan.sizes[-1] == final
    for stage, start in enumerate(plan.starts[1:], start=1):
        seen, before = (plan.before(step) * length for step in (start, start - 1))
        assert seen >= tokens * stage // stages
        assert before < tokens * stage // stages or plan.starts[stage - 1] == start - 1


def test_a_ramp_that_does_not_grow_in_whole_sequences_is_refused() -> None:
    for ramp in ({"sequences": 5, "stages": 8, "tokens": 1}, {"sequences": 16, "stages": 1, "tokens": 1}):
        config = PretrainConfig.model_validate({"steps": 1, "batch_sequences": 16, "batch_ramp": ramp})
        with pytest.raises(ValueError, match="must grow to batch_sequences"):
            batch_plan(config, 8)
